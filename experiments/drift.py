"""Drift (Remark A.1): how fast memories go stale while the model that wrote them trains on.

`train.py --keep_every 100` keeps checkpoints on the way; the first is what the run began from:

    python eval.py --drift checkpoints/toy out/drift/step_100.pt out/drift/step_300.pt

The references of validation text are written by each checkpoint, and all are read by the last one.
What has changed is looked at in two ways: the keys and values of the tokens that the last
checkpoint keeps, as the older one would have written them (cosine), and which tokens they keep.
What it costs is the loss of the last checkpoint on the text, with stale and with fresh memories.
The plot (pip install matplotlib) goes to out/drift.png.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import corpus
from common import UserError, find_device
from eval import columns
from experiments.text import open_text
from memory import Memories
from model import Memory3, load_checkpoint


def everything(model):
    """The same model with room for all tokens of a reference: it keeps every one."""
    config = {**vars(model.config), "memory_tokens": model.config.ref_len}
    twin = Memory3(type(model.config)(**config)).to(model.device)
    twin.load_state_dict(model.state_dict())
    return twin


@torch.inference_mode()
def compare(old, new, references, batch=64):
    """Memories of references (N, n), -1 = padding, by two writers of one shape.

    -> dict(keys, values: mean cosine over layers, heads and the tokens that `new` keeps; kept: the
    share of these tokens that `old` keeps as well)."""
    writer, sums, filled = everything(old), torch.zeros(3, dtype=torch.float64), 0
    for part in references.split(batch):
        fresh, index = new.write(part, return_indices=True)  # index (N, Lm, Hkv, S)
        stale, other = writer.write(part).kv, old.write(part, return_indices=True)[1]
        real = index >= 0
        at = index.clamp(min=0)[:, :, None, ..., None].expand_as(fresh.kv)
        cosine = F.cosine_similarity(stale.gather(4, at), fresh.kv, dim=-1)  # (N, Lm, 2, Hkv, S)
        both = (index.unsqueeze(-1) == other.unsqueeze(-2)).any(-1)  # (N, Lm, Hkv, S)
        sums += torch.stack([x[real].double().sum().cpu() for x in (*cosine.unbind(2), both)])
        filled += int(real.sum())
    return dict(zip(("keys", "values", "kept"), (sums / filled).tolist(), strict=True))


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
            pool, recall = Memories.empty(reader.config, device=reader.device), None
        total += float(reader(tokens, targets, pool, recall)[1]) * len(tokens)
    return total / n


def plot(rows, without, path):
    try:
        import matplotlib
    except ImportError:
        print(f"no {path}: the plot needs pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["behind"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, label in (
        ("keys", "cosine of keys"),
        ("values", "cosine of values"),
        ("kept", "share of kept tokens"),
    ):
        left.plot(steps, [row[name] for row in rows], "o-", label=label)
    right.plot(steps, [row["loss"] for row in rows], "o-", label="with stale memories")
    right.axhline(rows[-1]["loss"], ls=":", color="gray", label="with fresh memories")
    right.axhline(without, ls="--", color="gray", label="without memories")
    left.set_ylabel("agreement with fresh memories")
    right.set_ylabel("loss, nats a token")
    for axis in (left, right):
        axis.set_xlabel("steps since they were written")
        axis.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"\nplotted in {path}")


def main(a, picture="out/drift.png"):
    """a: eval.py's arguments. Prints a table, plots it, returns what goes into the JSON file."""
    opened = [load_checkpoint(path) for path in a.drift]
    if len(opened) < 2:
        raise UserError("--drift takes two checkpoints or more, the last of the training last")
    (last, meta), behind = opened[-1], []
    for path, (model, other) in zip(a.drift, opened, strict=True):
        if (model.config, other["tokenizer"]) != (last.config, meta["tokenizer"]):
            raise UserError(f"--drift {path}: not the same shape and tokenizer as {a.drift[-1]}")
        # a checkpoint of another run is what this run began from
        runs = [m.get("train", {}).get("out") for m in (other, meta)]
        behind.append(meta["step"] - (other["step"] if runs[0] == runs[1] else 0))
        if behind[-1] < 0:
            raise UserError(f"--drift {path} is later than {a.drift[-1]}: give the last one last")
        model.to(find_device(a.device)).eval()
    last.config.n_recall = a.n_recall or last.config.n_recall
    if meta["tokenizer"] != corpus.tokenizer(a.data).id:
        raise UserError(f"{a.drift[-1]} was not trained with the tokenizer of {a.data}")
    windows, n = open_text(a, last.config)
    found = sorted({int(i) for i in windows.neighbors[: n * windows.T // windows.C, 0] if i >= 0})
    references = windows.references.batch(found)
    print(f"{len(found)} references, {n} windows of {windows.T} tokens of {a.data}/{a.split}\n")
    without, rows = loss(last, None, windows, n), []
    for path, steps, (model, _) in zip(a.drift, behind, opened, strict=True):
        row = dict(checkpoint=path, behind=steps) | compare(model, last, references)
        rows.append(row | dict(loss=loss(last, model, windows, n)))
    head = ["steps since writing", "cosine of keys", "of values", "tokens kept by both", "loss"]
    names = ("keys", "values", "kept", "loss")
    lines = [[f"{row['behind']:,}", *(f"{row[k]:.4f}" for k in names)] for row in rows]
    print(columns(head, *lines, ["no memories", "", "", "", f"{without:.4f}"]))
    plot(rows, without, picture)
    return dict(split=a.split, windows=n, without=without, drift=rows)
