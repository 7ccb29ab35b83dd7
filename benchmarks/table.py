"""The goals, and the table of them in benchmarks/README.md, made from what bench.py wrote here.

python benchmarks/table.py            puts the table between the page's <!-- bench --> marks
python benchmarks/table.py --check    fails if another table stands there
"""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPU = ("cpu",)
GPU = ("cuda",)
BOTH = ("cpu", "cuda")


@dataclass
class Goal:
    """A figure of bench.py and the bound it should keep."""

    name: str
    what: str
    part: str  # of bench.py
    figure: str  # of this part
    sign: str  # "<=": at most the bound; ">=": at least
    bound: float
    kinds: tuple  # the kinds of device that it is for
    preset: str | None = "2.4b"  # the shape that it is for; None: the part's own

    def met(self, x):
        return x <= self.bound if self.sign == "<=" else x >= self.bound


# fmt: off
GOALS = [
    Goal("G1", "chunk attention against float64: error in float64",
         "attention", "error, float64", "<=", 1e-12, BOTH),
    Goal("G1", "the same in float32", "attention", "error, float32", "<=", 2e-6, BOTH),
    Goal("G1", "the same in bfloat16", "attention", "error, bfloat16", "<=", 1e-2, BOTH),
    Goal("G2", "decoding step, batch 32: floor / time",
         "throughput", "batch 32: floor / step", ">=", 0.6, GPU),
    Goal("G3", "decoding step, batch 1: floor / time",
         "throughput", "batch 1: floor / step", ">=", 0.6, GPU),
    Goal("G4", "decoding step with / without memory",
         "throughput", "batch 32: step, with / without", "<=", 1.04, GPU),
    Goal("G5", "tokens/s with / without memory, search and loading included (paper: 0.648)",
         "throughput", "batch 32: bf16 / without", ">=", 0.9, GPU),
    Goal("G5", "the same, codes", "throughput", "batch 32: codes / without", ">=", 0.95, GPU),
    Goal("G6", "whole run, bf16: floor / time (paper: 0.08 to 0.12)",
         "throughput", "batch 32: bf16: floor / time", ">=", 0.5, GPU),
    Goal("G6", "the same, codes", "throughput", "batch 32: codes: floor / time", ">=", 0.5, GPU),
    Goal("G7", "prefill with / without memories",
         "throughput", "batch 32: prefill, with / without", "<=", 1.08, GPU),
    Goal("G8", "implicit stage: model FLOPs utilisation", "train", "implicit: MFU", ">=", 0.4, GPU),
    Goal("G9", "explicit / implicit step (by FLOPs 1.82; paper: a bit over 2)",
         "train", "explicit / implicit", "<=", 1.9, GPU),
    Goal("G10", "decoding 160 memories' codes, ms",
         "codec", "decode 160 memories, ms", "<=", 0.5, GPU),
    Goal("G10", "decoding, vectors/s over FAISS's on one thread",
         "codec", "decode / FAISS", ">=", 500, GPU),
    Goal("G11", "decoding against FAISS: error", "codec", "decode - FAISS", "<=", 1e-6, BOTH),
    Goal("G11", "share of codes equal to FAISS's", "codec", "codes equal", ">=", 0.999, BOTH),
    Goal("G12", "reading memories, GB/s over a bare preadv loop's",
         "load", "cold: bank / preadv", ">=", 0.8, BOTH),
    Goal("G12", "the same over np.memmap's", "load", "cold: bank / memmap", ">=", 2, BOTH),
    Goal("G14", "attention and backward, time over causal alone",
         "attention", "merged / causal", "<=", 1.4, BOTH),
    Goal("G14", "the same over concatenating and masking",
         "attention", "merged / concatenate", "<=", 0.8, BOTH),
    Goal("G15", "flat search, time over torch matmul + topk",
         "search", "FAISS / torch", "<=", 1.3, BOTH),
    Goal("G16", "a training step a FLOP, time over a plain GPT's",
         "peers", "training, a FLOP / plain GPT's", "<=", 1.05, BOTH, None),
    Goal("G17", "decoding, batch 1: tokens/s over transformers' (static cache)",
         "peers", "decoding, batch 1 / transformers'", ">=", 1.5, BOTH, None),
    Goal("G17", "the same, batch 32",
         "peers", "decoding, batch 32 / transformers'", ">=", 1.5, BOTH, None),
    Goal("G18", "decoding with / without memories, batch 32, tokens/s of a step",
         "peers", "decoding, batch 32: with / without memories", ">=", 0.95, BOTH, None),
]
# fmt: on


def verdict(goal, parts):
    """parts: what bench.py measured on a device -> (figure or None, "met" | "NOT met" | ...).

    The figure is None, and the verdict "not measured", unless it was measured at the goal's shape
    on a device of a kind that the goal is for.
    """
    made = parts.get(goal.part)
    if made is None or made["kind"] not in goal.kinds:
        return None, "not measured"
    if goal.preset is not None and made["preset"] != goal.preset:
        return None, "not measured"
    x = made["figures"].get(goal.figure)
    if x is None or not math.isfinite(x):
        return None, "not measured"
    return x, "met" if goal.met(x) else "NOT met"


def lines(parts):
    """The goals for the screen."""
    result = []
    for goal in GOALS:
        x, word = verdict(goal, parts)
        figure = "" if x is None else f"{x:.3g}"
        bound = f"{goal.sign} {goal.bound:g}"
        result.append(f"{goal.name:4} {goal.what:74} {figure:>9} {bound:>9}  {word}")
    return result


def cell(goal, kind, parts):
    """A goal on one device, as the table shows it. Empty: the goal is not for this kind."""
    if kind not in goal.kinds:
        return ""
    x, word = verdict(goal, parts)
    if x is None:
        return word
    return f"{x:.3g}" if word == "met" else f"{x:.3g}, {word}"


def markdown(devices):
    """The table. devices: what bench.py measured, a dict a device; each gets a column, and so does
    a kind of device that was not at hand."""
    columns = []  # (head, kind, parts)
    for parts in devices:
        made = next(iter(parts.values()))
        columns.append((made["device"], made["kind"], parts))
    for kind, head in (("cpu", "a CPU"), ("cuda", "a GPU")):
        if kind not in [column[1] for column in columns]:
            columns.append((head, kind, {}))
    heads = " | ".join(head for head, _, _ in columns)
    rows = [f"| | goal | bound | {heads} |", "|---|---|--:|" + "--:|" * len(columns)]
    for goal in GOALS:
        cells = " | ".join(cell(goal, kind, parts) for _, kind, parts in columns)
        rows.append(f"| {goal.name} | {goal.what} | {goal.sign} {goal.bound:g} | {cells} |")
    return "\n".join(rows)


def main(argv=None, page=HERE / "README.md", folder=HERE):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare; fail if it is another")
    args = parser.parse_args(argv)
    devices = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    text = page.read_text()
    table = f"<!-- bench -->\n{markdown(devices)}\n<!-- /bench -->"
    if not re.search("<!-- bench -->.*<!-- /bench -->", text, re.S):
        raise ValueError(f"{page} has no place <!-- bench --> ... <!-- /bench -->")
    before, after = re.split("<!-- bench -->.*<!-- /bench -->", text, maxsplit=1, flags=re.S)
    new = before + table + after
    if args.check and new != text:
        raise ValueError(f"{page}: its table is not that of {folder}: python benchmarks/table.py")
    if new != text:
        page.write_text(new)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"table.py: {error}")
