"""The loss on validation text, condition by condition.

    python experiments/text.py --split explicit_heldout

Everything is read as in training: chunk c has the memories that chunks c-R+1..c retrieved. They are
written here and now, from the references of the split's neighbours: no bank is needed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bank import MemoryBank
from common import UserError, number, run
from eval import CONDITIONS, columns, json_flag, prepare_json, write_result
from generate import BANK, likelihood, model_flags, open_model, place
from memory import Memories
from train import TrainConfig, Windows


def text_flags(parser):
    """Adds the flags that say which text is read."""
    add = parser.add_argument
    add("--split", default="explicit_heldout", help="the text; it needs neighbours")
    add("--windows", type=number(int, 1), default=64, help="how many windows of it to read")
    add("--context", type=number(int, 1), default=256, help="T, tokens of a window")


def open_text(a, config):
    """The windows of --split with their neighbours, and how many of them to read."""
    cfg = TrainConfig(data=a.data, stage="explicit", context=a.context)
    windows = Windows(cfg, a.split, config)
    return windows, min(a.windows, windows.n)


def in_context(config, tokens, references, recall):
    """RAG on text, chunk by chunk: [(before, after)].

    after: the tokens that the chunk's positions predict. before: the references that the chunk
    would read and, as much of it as fits, the window so far.
    """
    chunk_len = config.chunk_len
    pairs = []
    for window, table in zip(tokens.tolist(), recall.tolist(), strict=True):
        for chunk, rows in enumerate(table):
            found = [references[j].tolist() for j in rows if j >= 0]
            texts = [token for text in found for token in text if token >= 0]
            start = chunk * chunk_len + 1
            own = window[1:start]
            after = window[start : start + chunk_len]
            room = config.max_context - len(texts) - len(after)
            own = own[max(0, len(own) - room) :]
            pairs.append(([window[0], *texts, *own], after))
    return pairs


@torch.inference_mode()
def text_losses(model, windows, n, conditions, codec=None, batch=8):
    """Nats a token of the first n windows of a split: {condition: loss}, read as in training.

    windows: a train.Windows with neighbours. Chunk c reads what chunks c-R+1..c retrieved, written
    here and now; as many random references; their codes and back; or their texts, in the context.
    """
    rng = np.random.default_rng(0)
    sums = dict.fromkeys(conditions, 0.0)
    none = Memories.empty(model.config, device=model.device)
    for i in tqdm(range(0, n, batch), "text", leave=False):
        part = windows.batch(range(i, min(n, i + batch)))
        tokens, targets, references, recall = (t.to(model.device) for t in part)
        others = rng.integers(0, len(windows.references), len(references))
        own = model.write(references)
        pools = dict(plain=None, none=none, recalled=own)
        pools["random"] = model.write(windows.references.batch(others))
        if codec:
            decoded = codec.decode(codec.encode(own.kv)).to(model.device)
            pools["quantized"] = Memories(decoded, own.count)
        for condition in conditions:
            if condition == "rag":
                sums[condition] += rag_nats(model, tokens, references, recall, batch) / (
                    windows.T - 1
                )
                continue
            reads = None if condition in ("plain", "none") else recall
            loss = model(tokens, targets, pools[condition], reads)[1]
            sums[condition] += float(loss) * len(tokens)
    return {condition: x / n for condition, x in sums.items()}


def rag_nats(model, tokens, references, recall, batch):
    """-log p of all tokens of a batch of windows, with the references as text before each chunk."""
    pairs = in_context(model.config, tokens, references, recall)
    nats = 0.0
    for i in range(0, len(pairs), batch):
        for logp, _ in likelihood(model, pairs[i : i + batch]):
            nats -= logp
    return nats


def open_codec(a, windows, model):
    """The codec of the vector-quantized memories; None, and a word on it, where there is none."""
    path = place(a.bank, a.data, Path(windows.references.path).name)
    try:
        return MemoryBank.open(path, model, codes=True).codec
    except UserError as error:
        print(f"quantized memories: left out, for {error}")
        return None


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    model_flags(p, bank=False)
    text_flags(p)
    p.add_argument("--bank", default=BANK, help="a knowledge base, for the codec of its memories")
    json_flag(p)
    return p


def main(argv=None):
    a = parser().parse_args(argv)
    prepare_json(a)
    model, _ = open_model(
        a.checkpoint, a.data, a.device, n_recall=a.n_recall, verify=not a.no_verify
    )
    windows, n = open_text(a, model.config)
    print(f"{n} windows of {windows.T} tokens of {a.data}/{a.split}\n")
    conditions = [condition for condition in CONDITIONS if condition != "oracle"]
    codec = open_codec(a, windows, model)
    if codec is None:
        conditions.remove("quantized")
    losses = text_losses(model, windows, n, conditions, codec)
    names = dict(CONDITIONS)
    names["recalled"] = f"recalled: by chunks c-{model.config.n_recall - 1}..c, as in training"
    names["quantized"] = "the same, vector-quantized"
    names["rag"] = "text in context (RAG: the same references)"
    lines = [[names[condition], f"{x:.4f}"] for condition, x in losses.items()]
    print(columns(["condition", "nats per token"], *lines))
    print("the right reference: not applicable, for a text names none")
    result = dict(split=a.split, windows=n, losses=losses)
    write_result(a, result)
    return result


if __name__ == "__main__":
    run(main)
