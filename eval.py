"""What explicit memory is worth, measured on questions about references the model never read.

    python eval.py --bank out/kb.bank --codes out/kb.codes --json out/demo.json

Each question is asked under six conditions (section 7's comparisons at the model's own scale): no
memory, memories of random references, recalled, recalled from the quantized bank, the right
reference given, and the recalled references as text in the context (RAG).
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import corpus
from memory import MemoryBank
from retrieval import Retriever
from sample import Given, Random, explain, generate, open_model

CONDITIONS = dict(
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
        raise FileNotFoundError(f"{path} is missing: run python {Path(path).parent}/prepare.py")
    lines = list(open(path))[:n]
    if not lines:
        raise ValueError(f"{path} holds no question")
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is damaged: {e}") from None

class Asker:
    """Asks questions under a condition: exactness, nats and time of each answer."""

    def __init__(self, model, tokenizer, references, retriever, bank, codes):
        self.model, self.tok, self.references = model, tokenizer, references
        self.retriever, self.bank, self.codes = retriever, bank, codes
        self.R = model.config.n_recall

    def prompt(self, row, condition):
        """-> prompt tokens: the question, and the name with which its answer begins.

        RAG reads in the plain format, best reference first: this is how the implicit stage has
        taught it to read, and what serves it best here (with the header it loses a third).
        """
        prompt = self.tok.encode(row["question"]) + self.tok.encode(row["city"])
        if condition == "rag":
            query = [self.tok.bos, *prompt][-self.model.config.chunk_len :]  # the same references
            ids = self.retriever.search([query], self.R)[0][0]
            prompt = [int(t) for i in ids if i >= 0 for t in self.references[int(i)]] + prompt
        return [self.tok.bos, *prompt]

    def sources(self, rows, condition):
        """-> retriever and bank for a batch of questions, as generate takes them."""
        if condition in ("none", "rag"):
            return None, None
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
        at the answer's start.
        """
        groups = defaultdict(list)
        for i, row in enumerate(rows):
            prompt = self.prompt(row, condition)
            for sentence in row["sentences"]:
                answer = self.tok.encode(sentence)
                groups[len(prompt), len(answer)].append((i, row, prompt, answer))
        results = [dict(exact=False, nats=math.inf, found=False) for _ in rows]
        for group in tqdm(groups.values(), condition, leave=False):
            for at in range(0, len(group), batch):
                part = group[at : at + batch]
                retriever, bank = self.sources([row for _, row, _, _ in part], condition)
                prompts = torch.tensor([p for _, _, p, _ in part])
                answers = torch.tensor([a for _, _, _, a in part])
                _, trace = generate(
                    self.model, prompts, answers.shape[1], retriever, bank,
                    plain=condition == "rag", forced=answers,
                )  # fmt: skip
                exact, logp = trace.greedy.all(1).tolist(), trace.logprobs.sum(1).tolist()
                for b, (i, row, prompt, _) in enumerate(part):
                    chunk = (len(prompt) - 1) // self.model.config.chunk_len
                    read = trace.table(chunk + 1)[b, chunk] if trace.recalls else []
                    result = results[i]
                    result["exact"] |= exact[b]
                    result["nats"] = -float(np.logaddexp(-result["nats"], logp[b]))
                    result["found"] = row["reference"] in read
        return results

    def ms_per_token(self, rows, condition):
        """Milliseconds a generated token, batch 1: search, load, prefill and steps together."""
        seconds = tokens = 0
        for row in rows:
            start = time.perf_counter()
            prompt = self.prompt(row, condition)  # for RAG this searches
            answer = self.tok.encode(row["sentences"][0])
            retriever, bank = self.sources([row], condition)
            plain = condition == "rag"
            generate(self.model, torch.tensor([prompt]), len(answer), retriever, bank, plain=plain)
            seconds += time.perf_counter() - start
            tokens += len(answer)
        return 1e3 * seconds / tokens

    def bytes_per_reference(self, condition, rows):
        if condition == "none":
            return 0
        if condition == "rag":
            texts = [self.tok.decode(self.references[r["reference"]]) for r in rows]
            return float(np.mean([len(t.encode()) for t in texts]))
        return (self.codes if condition == "quantized" else self.bank).record_bytes

def measure(asker, rows, conditions=CONDITIONS, timed=24):
    """-> {condition: dict(exact={"all", ...}, found, nats, bytes_per_reference, ms_per_token)}"""
    relations = list(dict.fromkeys(r["relation"] for r in rows))
    table = {}
    for condition in conditions:
        asked = asker.ask(rows, condition)
        exact = {"all": float(np.mean([a["exact"] for a in asked]))}
        for relation in relations:
            of = [a["exact"] for a, r in zip(asked, rows, strict=True) if r["relation"] == relation]
            exact[relation] = float(np.mean(of))
        table[condition] = dict(
            exact=exact,
            found=float(np.mean([a["found"] for a in asked])),
            nats=float(np.mean([a["nats"] for a in asked])),
            bytes_per_reference=asker.bytes_per_reference(condition, rows),
            ms_per_token=asker.ms_per_token(rows[:timed], condition),
        )
    return table

def markdown(table, names):
    """The table of conditions, as the README shows it."""
    relations = list(next(iter(table.values()))["exact"])
    head = ["condition", *relations, "nats per answer", "bytes per reference", "ms per token"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for condition, row in table.items():
        cells = [names[condition], *(f"{row['exact'][r]:.3f}" for r in relations)]
        cells += [f"{row['nats']:.2f}", f"{row['bytes_per_reference']:,.0f}"]
        cells += [f"{row['ms_per_token']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

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
    return p

def main(argv=None):
    a = parser().parse_args(argv)
    started = time.time()
    if a.questions < 1 or a.n_recall < 0:
        raise ValueError("--questions is at least 1, --n_recall at least 0")
    model, tokenizer = open_model(a.checkpoint, a.data, a.device)
    c = model.config
    references = corpus.References.open(f"{a.data}/{a.references}")
    retriever = Retriever.open(f"{a.data}/{a.references}.index", references=references)
    bank = MemoryBank.open(a.bank, model, references)
    try:
        codes = MemoryBank.open(a.codes, model, references)
    except (ValueError, FileNotFoundError) as e:
        raise ValueError(f"{e}. Codes: write.py --out {a.bank} --quantize {a.codes}") from None
    if not codes.codec:
        raise ValueError(f"{a.codes} is not quantized: give --codes another directory")
    if a.n_recall:  # after the banks have seen whose they are: what is written depends on no R
        c.n_recall = a.n_recall
    rows = load_questions(f"{a.data}/questions.jsonl", a.questions)
    print(f"{len(rows)} questions, {len(references):,} references")
    asker = Asker(model, tokenizer, references, retriever, bank, codes)
    table = measure(asker, rows)
    words = dict(R=c.n_recall, embedder=retriever.meta["embedder"])
    print(f"\n{markdown(table, {k: v.format(**words) for k, v in CONDITIONS.items()})}\n")
    recall = {condition: row.pop("found") for condition, row in table.items()}["recalled"]
    print(f"the right reference is among the top {c.n_recall} for {recall:.3f} of the questions")
    print(bank.stats())
    for row in rows[: a.examples]:
        prompt = torch.tensor([[tokenizer.bos, *tokenizer.encode(row["question"])]])
        stop = tokenizer.encoding.encode_ordinary(".")[0]
        out, trace = generate(model, prompt, 32, retriever, bank, stop=stop)
        answer = tokenizer.decode(out[0, prompt.shape[1] :]).strip()
        print(f"\n{row['question']}\n -> {answer}\n    (truth: {row['answer']})")
        print("\n".join(explain(model, tokenizer, references, out, trace, bank)))
    result = dict(conditions=table, recall_at_5=recall, questions=len(rows))
    result |= dict(references=len(references), seconds=time.time() - started)
    if a.json:
        Path(a.json).parent.mkdir(parents=True, exist_ok=True)
        corpus.write_json(a.json, result)
        print(f"\nwritten to {a.json}")
    return result

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        sys.exit(f"eval.py: {e}")
