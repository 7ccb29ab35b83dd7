"""What explicit memory is worth, in numbers: section 7's comparisons at the model's own scale.

    python eval.py --json out/demo.json           questions about references it never read
    python eval.py --text                         loss on validation text
    python eval.py --leak                         how much of that is copying (Table C.2)
    python eval.py --choices FILE                 multiple choice (sec. 7.1)
    python eval.py --drift A.pt B.pt C.pt         memories of older checkpoints (Remark A.1)

Each question is asked under the seven conditions below. The other four commands are files of their
own in experiments/: text.py, choices.py and drift.py, with one idea each.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import corpus
from bank import MemoryBank
from common import UserError, check, run, write_json
from generate import generate, open_model
from retrieval import Given, Random, Retriever
from views.explain import explain

ANSWER = 32  # tokens, at most
CONDITIONS = dict(
    plain="no memory, no header (the plain decoder)",
    none="no memory (header, empty pool)",
    random="memories of random references",
    recalled="recalled: {embedder}, top {R}",
    quantized="recalled, vector-quantized bank",
    oracle="the right reference given",
    rag="text in context (RAG: the same {R} references)",
)


def load_questions(path, n):
    """The first n questions of a questions.jsonl; the file takes the relations in turns."""
    if not Path(path).exists():
        raise UserError(f"{path} is missing: run python {Path(path).parent}/prepare.py")
    lines = [line for line in open(path) if line.strip()][:n]
    check(lines, f"{path} holds no question")
    keys = "question", "answer", "sentences", "relation", "city", "reference"
    try:
        return [{key: row[key] for key in keys} for row in map(json.loads, lines)]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged: {e!r}") from None


class Asker:
    """Asks questions under a condition: exactness, nats and time of each answer."""

    def __init__(self, model, tokenizer, references, retriever, bank, codes):
        self.model, self.tok, self.references = model, tokenizer, references
        self.retriever, self.bank, self.codes = retriever, bank, codes
        self.R = model.config.n_recall

    def prompt(self, row, condition):
        """-> prompt tokens: the question, and the name with which its answer begins.

        RAG reads in the plain format, best reference first: this is how the implicit stage has
        taught it to read, and what serves it best here (with the header it loses a third)."""
        prompt = self.tok.encode(row["question"]) + self.tok.encode(row["city"])
        if condition == "rag":
            query = [self.tok.bos, *prompt][-self.model.config.chunk_len :]  # the same references
            ids = self.retriever.search([query], self.R)[0][0]
            texts = [[int(t) for t in self.references[int(i)]] for i in ids if i >= 0]
            while len(prompt) + sum(map(len, texts)) > self.model.config.max_context - ANSWER:
                texts.pop()  # where not all fit: without the worst
            prompt = sum(texts, []) + prompt
        return [self.tok.bos, *prompt]

    def sources(self, rows, condition):
        """-> retriever and bank for a batch of questions, as generate takes them."""
        if condition in ("plain", "none", "rag"):
            return None, None  # nothing recalled
        if condition == "random":
            return Random(len(self.references), seed=rows[0]["reference"]), self.bank
        if condition == "oracle":
            return Given([[row["reference"]] for row in rows]), self.bank
        return self.retriever, self.codes if condition == "quantized" else self.bank

    def ask(self, rows, condition, batch=32):
        """-> per question dict(exact, nats, found). Sentences of equal lengths go together.

        Each sentence that gives the answer is followed token by token (`forced`). The answer is
        exact if in one of them each token was the likeliest, which is when greedy generation would
        have written it, full stop included. nats: -log of the sum of their probabilities (the
        branches of Definition 2.6). found: whether the right reference was among the memories read
        at the answer's start."""
        groups, plain = defaultdict(list), condition in ("plain", "rag")
        for i, row in enumerate(rows):
            prompt = self.prompt(row, condition)
            for sentence in row["sentences"]:
                answer = self.tok.encode(sentence)  # with the full stop
                groups[len(prompt), len(answer)].append((i, prompt, answer))
        results = [dict(exact=False, nats=math.inf, found=False) for _ in rows]
        for (start, n), group in tqdm(groups.items(), condition, leave=False):
            chunk = (start - 1) // self.model.config.chunk_len  # the last of the prompt
            for at in range(0, len(group), batch):
                numbers, prompts, answers = zip(*group[at : at + batch], strict=True)
                prompts, answers = torch.tensor(prompts), torch.tensor(answers)
                memory = self.sources([rows[i] for i in numbers], condition)
                _, trace = generate(self.model, prompts, n, *memory, plain=plain, forced=answers)
                exact, logp = trace.greedy.all(1).tolist(), trace.logprobs.sum(1).tolist()
                for b, i in enumerate(numbers):
                    read = trace.table(chunk + 1)[b, chunk] if trace.recalls else []
                    results[i]["exact"] |= exact[b]
                    results[i]["nats"] = -float(np.logaddexp(-results[i]["nats"], logp[b]))
                    results[i]["found"] = rows[i]["reference"] in read
        return results

    def ms_per_token(self, rows, condition):
        """Milliseconds a generated token, batch 1: search, load, prefill and steps together."""
        seconds, tokens, plain = 0, 0, condition in ("plain", "rag")
        for row in rows:
            start = time.perf_counter()
            prompt = self.prompt(row, condition)  # for RAG this searches
            answer = self.tok.encode(row["sentences"][0])
            memory = self.sources([row], condition)
            generate(self.model, torch.tensor([prompt]), len(answer), *memory, plain=plain)
            seconds += time.perf_counter() - start  # with what precedes the first token
            tokens += len(answer)
        return 1e3 * seconds / tokens

    def bytes_per_reference(self, condition, rows):
        if condition in ("plain", "none"):
            return 0  # nothing is kept
        if condition == "rag":
            texts = [self.tok.decode(self.references[r["reference"]]) for r in rows]  # UTF-8
            return float(np.mean([len(t.encode()) for t in texts]))
        return (self.codes if condition == "quantized" else self.bank).record_bytes


def measure(asker, rows, conditions=CONDITIONS, timed=24):
    """-> {condition: dict(exact={"all", ...}, found, nats, separable, bytes_..., ms_per_token)}

    separable (Definition 2.6): the share of facts with p <= 1/2 without memory and p >= 0.9 under
    the condition. The definition wants of the answer's tokens one <= 1/2 without, all >= 0.9 with.
    Here p = exp(-nats) is the whole answer's, summed over its wordings (the definition's branches):
    p >= 0.9 is more than it wants (no factor is below the product), p <= 1/2 less (0.7 x 0.7)."""
    answers = {c: asker.ask(rows, c) for c in dict.fromkeys(["none", *conditions])}
    p = {c: np.exp([-a["nats"] for a in asked]) for c, asked in answers.items()}
    table = {}
    for condition in conditions:
        asked = answers[condition]
        exact = {"all": [a["exact"] for a in asked]}
        for a, row in zip(asked, rows, strict=True):
            exact.setdefault(row["relation"], []).append(a["exact"])
        table[condition] = dict(
            exact={relation: float(np.mean(each)) for relation, each in exact.items()},
            found=float(np.mean([a["found"] for a in asked])),
            nats=float(np.mean([a["nats"] for a in asked])),
            separable=float(np.mean((p["none"] <= 0.5) & (p[condition] >= 0.9))),
            bytes_per_reference=asker.bytes_per_reference(condition, rows),
            ms_per_token=asker.ms_per_token(rows[:timed], condition),
        )
    return table


def columns(*lines):
    """A table in Markdown from lists of cells, the head first: names left, numbers right."""
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|---|" + "--:|" * (len(lines[0]) - 1), *rows[1:]])


def markdown(table, names):
    """The table of conditions, as the README shows it."""
    relations = list(next(iter(table.values()))["exact"])
    lines = [["condition", *relations, "nats per answer", "bytes per reference", "ms per token"]]
    for condition, row in table.items():
        cells = [names[condition], *(f"{row['exact'][r]:.3f}" for r in relations)]
        cells += [f"{row['nats']:.2f}", f"{row['bytes_per_reference']:,.0f}"]
        lines.append([*cells, f"{row['ms_per_token']:.1f}"])
    return columns(*lines)


# -- Command line -----------------------------------------------------------------------------


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--checkpoint", default="checkpoints/toy", help="a .pt file or its directory")
    p.add_argument("--data", default="data/cities", help="the prepared data set")
    p.add_argument("--references", default="kb", help="its knowledge base")
    p.add_argument("--bank", default="out/kb.bank", help="the memories of the knowledge base")
    p.add_argument("--codes", default="out/kb.codes", help="the same, vector-quantized")
    p.add_argument("--questions", type=int, default=600, help="how many to ask")
    p.add_argument("--examples", type=int, default=3, help="answers to show with their memories")
    p.add_argument("--n_recall", type=int, default=0, help="R, other than the checkpoint's")
    p.add_argument("--json", default="", help="write the results there too")
    p.add_argument("--device", default="auto")
    instead = p.add_argument_group("instead of the questions").add_mutually_exclusive_group()
    mode = instead.add_argument
    mode("--text", action="store_true", help="loss on windows of text")
    mode("--leak", action="store_true", help="its gain by overlap and query_shift")
    mode("--choices", metavar="FILE", help='JSON lines of "question", "choices" and "answer"')
    mode("--drift", nargs="+", metavar="PT", help="the last checkpoint reads the memories of each")
    p.add_argument("--split", default="explicit_heldout", help="the text; it needs neighbours")
    p.add_argument("--windows", type=int, default=64, help="of text: how many")
    p.add_argument("--context", type=int, default=256, help="tokens of a window")
    p.add_argument("--shots", type=int, default=0, help="solved examples before each choice")
    p.add_argument("--shots_from", metavar="FILE", help="the file whose first ones they are")
    return p


def open_reader(a):
    """-> model, tokenizer. What a memory is depends on no R: any bank of the model still fits."""
    model, tokenizer = open_model(a.checkpoint, a.data, a.device)
    model.config.n_recall = a.n_recall or model.config.n_recall
    return model, tokenizer


def open_memory(a, model):
    """-> the references of the knowledge base, what finds them, and the bank of their memories."""
    references = corpus.References.open(f"{a.data}/{a.references}")
    retriever = Retriever.open(f"{a.data}/{a.references}.index", references=references)
    return references, retriever, MemoryBank.open(a.bank, model, references)


def ask_questions(a):
    started, (model, tokenizer) = time.time(), open_reader(a)
    references, retriever, bank = open_memory(a, model)
    try:
        codes = MemoryBank.open(a.codes, model, references)
    except UserError as e:
        raise UserError(f"{e}. Codes: write.py --out {a.bank} --quantize {a.codes}") from None
    check(codes.codec, f"{a.codes} is not quantized: give --codes another directory")
    rows = load_questions(f"{a.data}/questions.jsonl", a.questions)
    print(f"{len(rows)} questions, {len(references):,} references")
    asker = Asker(model, tokenizer, references, retriever, bank, codes)
    table = measure(asker, rows)
    words = dict(R=model.config.n_recall, embedder=retriever.meta["embedder"])
    print(f"\n{markdown(table, {k: v.format(**words) for k, v in CONDITIONS.items()})}\n")
    recall = {condition: row.pop("found") for condition, row in table.items()}["recalled"]
    print(f"the right reference is among the top {words['R']} for {recall:.3f} of the questions")
    share = ", ".join(f"{k} {table[k]['separable']:.3f}" for k in ("oracle", "recalled", "rag"))
    print(f"separable facts (Definition 2.6; p <= 1/2 without memory, p >= 0.9 with): {share}")
    print(bank.stats())
    for row in rows[: a.examples]:
        prompt = torch.tensor([[tokenizer.bos, *tokenizer.encode(row["question"])]])
        stop = tokenizer.encoding.encode_ordinary(".")[0]
        out, trace = generate(model, prompt, ANSWER, retriever, bank, stop=stop)
        answer = tokenizer.decode(out[0, prompt.shape[1] :]).strip()  # written freely, not forced
        print(f"\n{row['question']}\n -> {answer}\n    (truth: {row['answer']})")
        print("\n".join(explain(model, tokenizer, references, out, trace, bank)))
    result = dict(conditions=table, recall_at_5=recall, questions=len(rows))
    return result | dict(references=len(references), seconds=time.time() - started)


def main(argv=None):
    a = parser().parse_args(argv)
    enough = min(a.questions, a.windows) >= 1 and min(a.n_recall, a.shots) >= 0
    check(enough, "--questions is at least 1, so is --windows; --n_recall, --shots: from 0")
    check(not a.json or not Path(a.json).is_dir(), f"--json {a.json} is a directory: give a file")
    Path(a.json).parent.mkdir(parents=True, exist_ok=True)  # now: not after the work
    if a.text or a.leak or a.choices or a.drift:
        from experiments import choices, drift, text  # they import this file

        result = (choices if a.choices else drift if a.drift else text).main(a)
    else:
        result = ask_questions(a)
    if a.json:
        write_json(a.json, result)
        print(f"\nwritten to {a.json}")
    return result


if __name__ == "__main__":
    run(main)
