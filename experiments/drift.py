"""Drift (Remark A.1): how fast memories go stale while the model that wrote them trains on.

`train.py --keep_every 100` keeps checkpoints on the way; the first is what the run began from:

    python experiments/drift.py checkpoints/toy out/drift/step_100.pt out/drift/step_300.pt

The references of validation text are written by each checkpoint, and all are read by the last one.
What has changed is looked at in two ways: the keys and values of the tokens that the last
checkpoint keeps, as the older one would have written them (cosine), and which tokens they keep.
What it costs is the loss of the last checkpoint on the text, with stale and with fresh memories.
The plot (pip install matplotlib) goes to out/drift.png.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import corpus
from common import UserError, check, find_device, make_directory, number, optional, run
from eval import columns, json_flag, prepare_json, write_result
from experiments.text import open_text, text_flags
from generate import say_what_runs
from memory import Memories
from model import Memory3, load_checkpoint


def everything(model):
    """The same model with room for all tokens of a reference: it keeps every one."""
    config = dict(vars(model.config), memory_tokens=model.config.ref_len)
    twin = Memory3(type(model.config)(**config)).to(model.device)
    twin.load_state_dict(model.state_dict())
    return twin


@torch.inference_mode()
def compare(old, new, references, batch=64):
    """Memories of references (N, n), -1 = padding, by two writers of one shape.

    -> dict(keys, values: mean cosine over layers, heads and the tokens that `new` keeps; kept: the
    share of these tokens that `old` keeps as well)."""
    writer = everything(old)
    sums = dict(keys=0.0, values=0.0, kept=0.0)
    n_kept = 0
    for part in references.split(batch):
        fresh, index = new.write(part, return_indices=True)  # index (N, Lm, Hkv, S)
        other = old.write(part, return_indices=True)[1]  # (N, Lm, Hkv, S)
        real = index >= 0
        stale = writer.write(part).kv  # (N, Lm, 2, Hkv, n, dh): all tokens
        at = index.clamp(min=0)[:, :, None, :, :, None].expand_as(fresh.kv)
        stale = stale.gather(4, at)  # (N, Lm, 2, Hkv, S, dh): those that `new` keeps
        cosine = F.cosine_similarity(stale, fresh.kv, dim=-1)  # (N, Lm, 2, Hkv, S)
        both = (index.unsqueeze(-1) == other.unsqueeze(-2)).any(-1)  # (N, Lm, Hkv, S)
        sums["keys"] += float(cosine[:, :, 0][real].double().sum())
        sums["values"] += float(cosine[:, :, 1][real].double().sum())
        sums["kept"] += float(both[real].double().sum())
        n_kept += int(real.sum())
    return {name: x / n_kept for name, x in sums.items()}


@torch.inference_mode()
def loss(reader, writer, windows, n, batch=8):
    """Nats a token of the reader on n windows, with the writer's memories (None: an empty pool)."""
    total = 0.0
    for i in range(0, n, batch):
        part = windows.batch(range(i, min(n, i + batch)))
        tokens, targets, references, recall = (t.to(reader.device) for t in part)
        if writer:
            pool = writer.write(references)
        else:
            pool = Memories.empty(reader.config, device=reader.device)
            recall = None
        total += float(reader(tokens, targets, pool, recall)[1]) * len(tokens)
    return total / n


def plot(rows, without, path):
    """Agreement with fresh memories, and the loss, over the steps since they were written."""
    Figure = optional("matplotlib.figure").Figure
    steps = [row["behind"] for row in rows]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = dict(keys="cosine of keys", values="cosine of values", kept="share of kept tokens")
    for name, label in labels.items():
        left.plot(steps, [row[name] for row in rows], "o-", label=label)
    right.plot(steps, [row["loss"] for row in rows], "o-", label="with stale memories")
    right.axhline(rows[-1]["loss"], ls=":", color="gray", label="with fresh memories")
    right.axhline(without, ls="--", color="gray", label="without memories")
    left.set_ylabel("agreement with fresh memories")
    right.set_ylabel("loss, nats a token")
    for axis in (left, right):
        axis.set_xlabel("steps since they were written")
        axis.legend(frameon=False)
    make_directory(Path(path).parent)
    figure.savefig(path, dpi=110)
    print(f"\nplotted in {path}")


def steps_behind(path, meta, last_path, last_meta):
    """How many steps before the last checkpoint this one was saved."""
    runs = [m.get("train", {}).get("out") for m in (meta, last_meta)]
    # a checkpoint of another run is what this run began from
    start = meta["step"] if runs[0] == runs[1] else 0
    behind = last_meta["step"] - start
    check(behind >= 0, f"{path} is later than {last_path}: give the last one last")
    return behind


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    p.add_argument(
        "checkpoints", nargs="+", metavar="PT", help="of one training, the last one last"
    )
    p.add_argument("--data", default="data/cities", help="a prepared data set")
    p.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one")
    p.add_argument("--n_recall", type=number(int, 0), default=0, help="R; 0: the checkpoints'")
    p.add_argument("--png", default="out/drift.png", help="the picture")
    text_flags(p)
    json_flag(p)
    return p


def main(argv=None):
    a = parser().parse_args(argv)
    prepare_json(a)
    check(len(a.checkpoints) > 1, "give two checkpoints or more, the last of the training last")
    opened = [load_checkpoint(path) for path in a.checkpoints]
    last_path = a.checkpoints[-1]
    last, last_meta = opened[-1]
    behind = []
    for path, (model, meta) in zip(a.checkpoints, opened, strict=True):
        same = model.config == last.config and meta["tokenizer"] == last_meta["tokenizer"]
        check(same, f"{path}: not the same shape and tokenizer as {last_path}")
        behind.append(steps_behind(path, meta, last_path, last_meta))
        model.to(find_device(a.device)).eval()
        if a.n_recall:
            model.config.n_recall = a.n_recall
        say_what_runs(path, model)
    tokenizer = corpus.tokenizer(a.data)
    line = f"{last_path} was not trained with the tokenizer of {a.data}"
    check(last_meta["tokenizer"] == tokenizer.id, line)
    windows, n = open_text(a, last.config)
    n_chunks = n * windows.T // windows.C
    found = {int(i) for i in windows.neighbors[:n_chunks, 0] if i >= 0}
    references = windows.references.batch(sorted(found))
    print(f"{len(found)} references, {n} windows of {windows.T} tokens of {a.data}/{a.split}\n")
    without = loss(last, None, windows, n)
    rows = []
    for path, steps, (model, _) in zip(a.checkpoints, behind, opened, strict=True):
        row = dict(checkpoint=path, behind=steps)
        row |= compare(model, last, references)
        row["loss"] = loss(last, model, windows, n)
        rows.append(row)
    head = ["steps since writing", "cosine of keys", "of values", "tokens kept by both", "loss"]
    lines = []
    for row in rows:
        numbers = [f"{row[name]:.4f}" for name in ("keys", "values", "kept", "loss")]
        lines.append([f"{row['behind']:,}", *numbers])
    lines.append(["no memories", "", "", "", f"{without:.4f}"])
    print(columns(head, *lines))
    try:
        plot(rows, without, a.png)
    except UserError as error:  # no matplotlib: the table is there all the same
        print(f"no {a.png}: {error}")
    result = dict(split=a.split, windows=n, without=without, drift=rows)
    write_result(a, result)
    return result


if __name__ == "__main__":
    run(main)
