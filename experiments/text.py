"""Validation text: the loss under each condition, and how much of the gain is copying (Table C.2).

    python eval.py --text --split explicit_heldout      loss, condition by condition
    python eval.py --leak --split explicit_heldout      gain, by what retrieval may recall

Everything is read as in training: chunk c has the memories that chunks c-R+1..c retrieved. They are
written here and now, from the references of the split's neighbours: no bank is needed.
"""

import numpy as np
import torch
from tqdm import tqdm

from bank import MemoryBank
from common import UserError
from eval import CONDITIONS, columns, open_reader
from generate import likelihood
from memory import Memories
from retrieval import Retriever, neighbors
from train import TrainConfig, Windows


def open_text(a, config):
    """The windows of --split with their neighbours, and how many of them to read."""
    cfg = TrainConfig(data=a.data, stage="explicit", context=a.context)
    windows = Windows(cfg, a.split, config)
    return windows, min(a.windows, windows.n)


def in_context(config, tokens, references, recall):
    """RAG on text: per chunk the pair (the references it would read and, as much of it as fits,
    the window so far; the tokens that the chunk's positions predict)."""
    C, pairs = config.chunk_len, []
    for window, table in zip(tokens.tolist(), recall.tolist(), strict=True):
        for c, rows in enumerate(table):
            texts = [t for j in rows if j >= 0 for t in references[j].tolist() if t >= 0]
            own, after = window[1 : c * C + 1], window[c * C + 1 : (c + 1) * C + 1]
            room = config.max_context - len(texts) - len(after)
            pairs.append(([window[0], *texts, *own[max(0, len(own) - room) :]], after))
    return pairs


@torch.inference_mode()
def text_losses(model, windows, n, conditions, codec=None, batch=8):
    """Nats a token of the first n windows of a split: {condition: loss}, read as in training.

    windows: a train.Windows with neighbours. Chunk c reads what chunks c-R+1..c retrieved, written
    here and now; as many random references; their codes and back; or their texts, in the context.
    """
    rng, sums = np.random.default_rng(0), dict.fromkeys(conditions, 0.0)
    for i in tqdm(range(0, n, batch), "text", leave=False):
        part = windows.batch(range(i, min(n, i + batch)))
        tokens, targets, references, recall = (t.to(model.device) for t in part)
        some = windows.references.batch(rng.integers(0, len(windows.references), len(references)))
        own, none = model.write(references), Memories.empty(model.config, device=model.device)
        read = dict(plain=(None, None), none=(none, None), recalled=(own, recall))
        read["random"] = model.write(some), recall
        if codec:
            coded = codec.decode(codec.encode(own.kv))
            read["quantized"] = Memories(coded.to(model.device), own.count), recall
        for condition in conditions:
            if condition == "rag":
                pairs = in_context(model.config, tokens, references, recall)
                parts = [pairs[j : j + batch] for j in range(0, len(pairs), batch)]
                logp = sum(x for part in parts for x, _ in likelihood(model, part))
                sums[condition] -= logp / (windows.T - 1)
            else:
                loss = model(tokens, targets, *read[condition])[1]
                sums[condition] += float(loss) * len(tokens)
    return {condition: x / n for condition, x in sums.items()}


def leak(model, windows, retriever, n, thresholds=(None, 0.9, 0.8, 2 / 3)):
    """The gain of memory on text, by how much a reference may copy of it (Table C.2).

    A reference that overlaps the window around its chunk by more than the threshold, eq. (3.3), is
    dropped, and the next best of 16 more takes its place. query_shift 0: a chunk reads what its own
    text retrieved, as in training (paper); 1: what the text before it did, as in generation.
    A gain that goes with the copies was copying.
    -> rows of dict(threshold, changed, empty: shares of the chunks; gain: [of shift 0, of 1])
    """
    base, rows, first = text_losses(model, windows, n, ["none"])["none"], [], None
    for threshold in thresholds:
        ids = neighbors(
            windows.tokens[: n * windows.T],
            windows.C,
            windows.references,
            retriever,
            1,
            threshold=threshold or 1.0,
            context=windows.T,
            extra=16,
        )
        first = ids if first is None else first
        row = dict(threshold=threshold, changed=float((ids != first).mean()))
        row |= dict(empty=float((ids < 0).mean()), gain=[])
        windows.neighbors = ids
        for shift in (0, 1):
            windows.shift = shift
            loss = text_losses(model, windows, n, ["recalled"])["recalled"]
            row["gain"].append(base - loss)
        rows.append(row)
    return rows


def main(a):
    """a: eval.py's arguments. Prints a table, returns what goes into the JSON file."""
    model, _ = open_reader(a)
    windows, n = open_text(a, model.config)
    print(f"{n} windows of {windows.T} tokens of {a.data}/{a.split}\n")
    if a.leak:
        references = windows.references
        retriever = Retriever.open(f"{references.path}.index", references=references)
        rows = leak(model, windows, retriever, n)
        head = ["largest overlap", "neighbours changed", "none left", "gain, query_shift 0", "1"]
        lines = [
            [f"{row['threshold']:.2f}" if row["threshold"] else "no filter"]
            + [f"{row['changed']:.3f}", f"{row['empty']:.3f}", *(f"{x:.3f}" for x in row["gain"])]
            for row in rows
        ]
        print(columns(head, *lines))
        return dict(split=a.split, windows=n, leak=rows)
    conditions, codec = [c for c in CONDITIONS if c != "oracle"], None
    try:
        codec = MemoryBank.open(a.codes, model).codec
    except UserError as e:
        conditions.remove("quantized")
        print(f"quantized memories: left out, for {e}")
    losses = text_losses(model, windows, n, conditions, codec)
    R = model.config.n_recall
    names = CONDITIONS | dict(
        recalled=f"recalled: by chunks c-{R - 1}..c, as in training",
        quantized="the same, vector-quantized",
        rag="text in context (RAG: the same references)",
    )
    lines = [[names[c], f"{x:.4f}"] for c, x in losses.items()]
    print(columns(["condition", "nats per token"], *lines))
    print("the right reference: not applicable, for a text names none")
    return dict(split=a.split, windows=n, losses=losses)
