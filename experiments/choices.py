"""Multiple choice from a file of JSON lines, with and without memory (sec. 7.1).

    python experiments/choices.py items.jsonl --shots 2 --shots_from examples.jsonl

A line is {"question": text, "choices": [text, ...], "answer": one of the choices, or its number}.
The model answers with the choice that is likeliest to follow the question, by its log-probability
a character, so that a long one is not at a disadvantage. Memories are recalled by the question
alone, neither by the solved examples before it nor by the choices; all chunks read them. What
resembles the question is not recalled.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import check, number, numbered_rows, run
from eval import CONDITIONS, columns, is_text, json_flag, prepare_json, write_result
from generate import likelihood, model_flags, open_memory, open_model, pool_of
from memory import Memories
from retrieval import Filtered

FORM = '{"question": text, "choices": [texts], "answer": one of them or its number}'


def load(path):
    """-> rows (question, choices, number of the right one). UserError names the line."""
    schema = dict(question=str, choices=list, answer=(int, str))
    rows = []
    for line, row in numbered_rows(path, schema, f"a line is {FORM}"):
        question = row["question"]
        choices = row["choices"]
        right = row["answer"]
        fits = all(is_text(text) for text in [question, *choices])
        if isinstance(right, str):
            fits = fits and right in choices
            right = choices.index(right) if fits else -1
        fits = fits and 0 <= right < len(choices)
        check(fits, f"{path}, line {line}: a line is {FORM}")
        rows.append((question, choices, right))
    return rows


def answer(model, tokenizer, rows, shots, retriever, bank):
    """Which questions are answered rightly: {condition: [bool, ...]}.

    rows, shots: as load returns them. A choice follows its question after a space, an example
    after a line break."""
    cfg = model.config
    shown = [tokenizer.bos]
    for question, choices, right in shots:
        shown += tokenizer.encode(question)
        shown += tokenizer.encode(" " + choices[right].lstrip())
        shown += tokenizer.encode("\n")
    none = Memories.empty(cfg, device=model.device)
    results = dict(plain=[], none=[], recalled=[])
    for question, choices, right in tqdm(rows, "choices", leave=False):
        query = tokenizer.encode(question)
        choices = [" " + choice.lstrip() for choice in choices]
        pairs = [(shown + query, tokenizer.encode(choice)) for choice in choices]
        n = len(shown) + len(query) + max(len(after) for _, after in pairs) - 1
        line = f"{question[:40]!r}, its choices and {len(shots)} --shots are {n} tokens"
        check(
            n <= cfg.max_context, f"{line}; the context is at most max_context = {cfg.max_context}"
        )
        ids = retriever.search([query], cfg.n_recall)[0]  # (1, R)
        pool, table = pool_of(bank, ids, model)
        table = table.expand(len(pairs), -1)  # (n_choices, R)
        read = dict(plain=(None, None), none=(none, None), recalled=(pool, table))
        for condition, (memories, recall) in read.items():
            scores = []
            for choice, (logp, _) in zip(
                choices, likelihood(model, pairs, memories, recall), strict=True
            ):
                scores.append(logp / len(choice))
            results[condition].append(int(np.argmax(scores)) == right)
    return results


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    p.add_argument("items", metavar="FILE", help="JSON lines of question, choices and answer")
    p.add_argument("--shots", type=number(int, 0), default=0, help="solved examples before each")
    p.add_argument("--shots_from", metavar="FILE", help="the file whose first ones they are")
    model_flags(p)
    json_flag(p)
    return p


def main(argv=None):
    a = parser().parse_args(argv)
    prepare_json(a)
    rows = load(a.items)
    shots = []
    if a.shots:
        check(a.shots_from, "--shots needs --shots_from, a file of solved examples")
        shots = load(a.shots_from)[: a.shots]
        line = f"{a.shots_from} has {len(shots)} examples, --shots wants {a.shots}"
        check(len(shots) == a.shots, line)
    model, tokenizer = open_model(
        a.checkpoint, a.data, a.device, n_recall=a.n_recall, verify=not a.no_verify
    )
    references, retriever, bank = open_memory(a, model)
    results = answer(model, tokenizer, rows, shots, Filtered(retriever, references), bank)
    names = dict(CONDITIONS)
    top = f"top {model.config.n_recall}, overlap at most 2/3"
    names["recalled"] = f"recalled by the question: {top}"
    result = dict(file=a.items, shots=a.shots, items=len(rows))
    lines = []
    for condition, right in results.items():
        p = float(np.mean(right))
        error = math.sqrt(p * (1 - p) / max(1, len(rows) - 1))  # of the mean of 0s and 1s
        result[condition] = dict(accuracy=p, standard_error=error)
        lines.append([names[condition], f"{len(rows):,}", f"{p:.3f}", f"{error:.3f}"])
    print(columns(["condition", "items", "accuracy", "standard error"], *lines))
    write_result(a, result)
    return result


if __name__ == "__main__":
    run(main)
