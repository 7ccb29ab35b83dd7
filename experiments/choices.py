"""Multiple choice from a JSONL file, with and without memory (sec. 7.1).

    python eval.py --choices items.jsonl --shots 2 --shots_from examples.jsonl

A line is {"question": text, "choices": [text, ...], "answer": one of the choices, or its number}.
The model answers with the choice that is likeliest to follow the question, by its log-probability
a character, so that a long one is not at a disadvantage. Memories are recalled by the question
alone, neither by the solved examples before it nor by the choices; all chunks read them. What
resembles the question is not recalled.
"""

import json
import math

import numpy as np
from tqdm import tqdm

from common import UserError, check
from eval import CONDITIONS, columns, open_memory, open_reader
from generate import likelihood, pool_of
from memory import Memories
from retrieval import Filtered


def load(path):
    """-> rows (question, choices, number of the right one)."""
    rows = []
    for n, line in enumerate(open(path), 1):
        try:
            row = json.loads(line)
            question, choices, right = row["question"], row["choices"], row["answer"]
            right = right if isinstance(right, int) else choices.index(right)
            texts = [question, *choices] if isinstance(choices, list) else [None]
            whole = all(isinstance(x, str) and x.strip() for x in texts)
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole or not 0 <= right < len(choices):
            form = '{"question": text, "choices": [texts], "answer": one of them or its number}'
            raise UserError(f"{path}, line {n}: a line is {form}")
        rows.append((question, choices, right))
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def answer(model, tokenizer, rows, shots, retriever, bank):
    """Which questions are answered rightly: {condition: [bool, ...]}.

    rows, shots: as load returns them. A choice follows its question after a space, an example
    after a line break."""
    shown, right = [tokenizer.bos], dict(plain=[], none=[], recalled=[])
    for question, choices, number in shots:
        shown += tokenizer.encode(question) + tokenizer.encode(" " + choices[number].lstrip())
        shown += tokenizer.encode("\n")
    none = Memories.empty(model.config, device=model.device)
    for question, choices, number in tqdm(rows, "choices", leave=False):
        query, choices = tokenizer.encode(question), [" " + x.lstrip() for x in choices]
        pairs = [(shown + query, tokenizer.encode(choice)) for choice in choices]
        n, most = len(pairs[0][0]) + max(len(x) for _, x in pairs) - 1, model.config.max_context
        line = f"{question[:40]!r}, its choices and {len(shots)} --shots are {n} tokens"
        check(n <= most, f"{line}; the context is at most max_context = {most}")
        pool, table = pool_of(bank, retriever.search([query], model.config.n_recall)[0], model)
        read = dict(plain=(None, None), none=(none, None))
        read["recalled"] = pool, table.expand(len(pairs), -1)
        for condition, (memories, recall) in read.items():
            logp = [x for x, _ in likelihood(model, pairs, memories, recall)]
            each = [x / len(choice) for x, choice in zip(logp, choices, strict=True)]
            right[condition].append(int(np.argmax(each)) == number)
    return right


def main(a):
    """a: eval.py's arguments. Prints a table, returns what goes into the JSON file."""
    rows = load(a.choices)
    if a.shots and not a.shots_from:
        raise UserError("--shots needs --shots_from, a file of solved examples")
    shots = load(a.shots_from)[: a.shots] if a.shots else []
    if len(shots) < a.shots:
        raise UserError(f"{a.shots_from} has {len(shots)} examples, --shots wants {a.shots}")
    model, tokenizer = open_reader(a)
    references, retriever, bank = open_memory(a, model)
    right = answer(model, tokenizer, rows, shots, Filtered(retriever, references), bank)
    recalled = f"recalled by the question: top {model.config.n_recall}, overlap at most 2/3"
    names = CONDITIONS | dict(recalled=recalled)
    result, lines = dict(file=a.choices, shots=a.shots, items=len(rows)), []
    for condition, yes in right.items():
        p = float(np.mean(yes))
        error = math.sqrt(p * (1 - p) / max(1, len(rows) - 1))  # of the mean of 0s and 1s
        result[condition] = dict(accuracy=p, standard_error=error)
        lines.append([names[condition], f"{len(rows):,}", f"{p:.3f}", f"{error:.3f}"])
    print(columns(["condition", "items", "accuracy", "standard error"], *lines))
    return result
