"""Which heads find memories by themselves (Remark 3.1): recall@5 by layer and head.

    python experiments/inside.py
    python experiments/inside.py --questions_file data/cities/questions_reworded.jsonl

Each head of the memory layers is asked as `retrieval.py index --embedder self:LAYER.HEAD` would:
the kept keys of all references, the queries of the question (inside.py). Beside it, on the same
questions, the hash embedder. "Shares few words": the half of the questions that have the smallest
part of their words, the longest word aside (it is mostly the name), in common with their reference.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import corpus
from common import number, run
from embed import embedder, words
from eval import columns, json_flag, load_questions, prepare_json, write_result
from generate import model_flags, open_model
from inside import BATCH, KeyRetriever, stored_keys

K = 5


def shared_words(question, reference):
    """The part of a question's words, its longest aside, that its reference has."""
    asked = set(words(question))
    asked.discard(max(asked, key=len, default=""))
    return len(asked & set(words(reference))) / max(1, len(asked))


@torch.inference_mode()
def all_keys(model, references):
    """The kept keys of all references as unit vectors: {(i, head): [N arrays (count, dh)]}."""
    cfg = model.config
    heads = [(i, head) for i in range(cfg.n_memory_layer) for head in range(cfg.n_kv_head)]
    keys = {pair: [] for pair in heads}
    for start in tqdm(range(0, len(references), BATCH), "writing"):
        ids = range(start, min(start + BATCH, len(references)))
        memories = model.write(references.batch(ids))
        for i, head in heads:
            keys[i, head] += stored_keys(memories, i, head)
    return keys


def found(ids, rows):
    """Whether the right reference of each row is among ids (n, K)."""
    right = np.array([row["reference"] for row in rows])
    return (ids == right[:, None]).any(1)


def main(argv=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    model_flags(p, bank=False)
    p.add_argument("--references", default="kb", help="its knowledge base")
    p.add_argument("--questions_file", help="other questions than DATA/questions.jsonl")
    p.add_argument("--questions", type=number(int, 1), default=600, help="how many of them")
    json_flag(p)
    a = p.parse_args(argv)
    prepare_json(a)
    model, tokenizer = open_model(a.checkpoint, a.data, a.device, verify=not a.no_verify)
    references = corpus.References.open(Path(a.data, a.references))
    rows = load_questions(a.questions_file or f"{a.data}/questions.jsonl", a.questions)
    questions = [row["question"] for row in rows]
    texts = [tokenizer.decode(references[i].tolist()) for i in range(len(references))]
    shared = [shared_words(row["question"], texts[row["reference"]]) for row in rows]
    few = np.argsort(shared, kind="stable")[: (len(rows) + 1) // 2]
    print(f"{len(rows)} questions, {len(references):,} references")
    result = {}

    def add(name, ids):
        hits = found(ids, rows)
        result[name] = dict(recall_at_5=float(hits.mean()), few_words=float(hits[few].mean()))

    by_text = embedder("hash").fit(texts)
    scores = torch.from_numpy(by_text.encode(questions) @ by_text.encode(texts).T)
    add("hash", scores.topk(K).indices.numpy())
    cfg = model.config
    for (i, head), keys in all_keys(model, references).items():
        name = f"self:{cfg.memory_layers[i]}.{head}"
        if cfg.kept_heads is None or (i, head) in cfg.kept_heads:
            pairs = enumerate(keys)
            made = KeyRetriever.make("", model, name, tokenizer, "", len(keys), pairs)
            add(name, made.search(questions, K)[0])
            print(f"{name}: {result[name]['recall_at_5']:.3f}", flush=True)
    lines = [["embedder", "recall@5", "shares few words"]]
    for name, row in result.items():
        lines.append([name, f"{row['recall_at_5']:.3f}", f"{row['few_words']:.3f}"])
    print(f"\n{columns(*lines)}")
    half = np.array(shared)[few]
    print(
        f"\na reference has {np.mean(shared):.2f} of its question's words (few: {half.mean():.2f})"
    )
    write_result(a, result)
    return result


if __name__ == "__main__":
    run(main)
