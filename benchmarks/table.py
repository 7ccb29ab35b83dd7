"""The goals, and the README's table of them, made from the files that bench.py writes here.

python benchmarks/table.py            puts the table between the README's <!-- bench --> marks
python benchmarks/table.py --check    fails if another table stands there
"""

import json
import math
import operator
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPARE = {"<=": operator.le, ">=": operator.ge}
CPU, GPU, BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")
GOALS = [  # name, what; part and figure of bench.py; at most or at least; on which kinds of device
    (
        "G1",
        "chunk attention against float64: error in float64",
        "attention",
        "error, float64",
        "<=",
        1e-12,
        BOTH,
    ),
    ("G1", "the same in float32", "attention", "error, float32", "<=", 2e-6, BOTH),
    ("G1", "the same in bfloat16", "attention", "error, bfloat16", "<=", 1e-2, BOTH),
    (
        "G2",
        "decoding step, batch 32: floor / time",
        "throughput",
        "batch 32: floor / step",
        ">=",
        0.6,
        GPU,
    ),
    (
        "G3",
        "decoding step, batch 1: floor / time",
        "throughput",
        "batch 1: floor / step",
        ">=",
        0.6,
        GPU,
    ),
    (
        "G4",
        "decoding step with / without memory",
        "throughput",
        "batch 32: step, with / without",
        "<=",
        1.04,
        GPU,
    ),
    (
        "G5",
        "tokens/s with / without retrieval, bf16 (paper: 0.648)",
        "throughput",
        "batch 32: bf16 / without",
        ">=",
        0.9,
        GPU,
    ),
    ("G5", "the same, codes", "throughput", "batch 32: codes / without", ">=", 0.95, GPU),
    (
        "G6",
        "whole run, bf16: floor / time (paper: 0.08 to 0.12)",
        "throughput",
        "batch 32: bf16: floor / time",
        ">=",
        0.5,
        GPU,
    ),
    ("G6", "the same, codes", "throughput", "batch 32: codes: floor / time", ">=", 0.5, GPU),
    (
        "G7",
        "prefill with / without memories",
        "throughput",
        "batch 32: prefill, with / without",
        "<=",
        1.08,
        GPU,
    ),
    ("G8", "implicit stage: model FLOPs utilisation", "train", "implicit: MFU", ">=", 0.4, GPU),
    (
        "G9",
        "explicit / implicit step (paper: a bit over 2)",
        "train",
        "explicit / implicit",
        "<=",
        2.05,
        GPU,
    ),
    ("G10", "decoding 160 memories' codes, ms", "codec", "decode 160 memories, ms", "<=", 0.5, GPU),
    (
        "G10",
        "decoding, vectors/s over FAISS's on one thread",
        "codec",
        "decode / FAISS",
        ">=",
        500,
        GPU,
    ),
    ("G11", "decoding against FAISS: error", "codec", "decode - FAISS", "<=", 1e-6, BOTH),
    ("G11", "share of codes equal to FAISS's", "codec", "codes equal", ">=", 0.999, BOTH),
    (
        "G12",
        "reading memories, GB/s over a bare preadv loop's",
        "load",
        "cold: bank / preadv",
        ">=",
        0.8,
        BOTH,
    ),
    ("G12", "the same over np.memmap's", "load", "cold: bank / memmap", ">=", 2, BOTH),
    (
        "G14",
        "attention and backward, time over causal alone",
        "attention",
        "merged / causal",
        "<=",
        1.4,
        CPU,
    ),
    (
        "G14",
        "the same over concatenating and masking",
        "attention",
        "merged / concatenate",
        "<=",
        0.8,
        CPU,
    ),
    (
        "G15",
        "flat search, time over torch matmul + topk",
        "search",
        "FAISS / torch",
        "<=",
        1.3,
        BOTH,
    ),
]


def verdicts(parts):
    """parts: what bench.py measured on a device -> [(name, what, figure, bound, verdict)].

    The figure is None, and the verdict "not measured", unless it was measured at the shape "2.4b"
    on a device of the kind that the goal is for.
    """
    rows = []
    for name, what, part, figure, sign, bound, where in GOALS:
        made = parts.get(part, dict(kind="", preset="", figures={}))
        x = made["figures"].get(figure) if made["kind"] in where else None
        if x is None or made["preset"] != "2.4b" or not math.isfinite(x):
            x, verdict = None, "not measured"
        else:
            verdict = "met" if COMPARE[sign](x, bound) else "NOT met"
        rows.append((name, what, x, f"{sign} {bound:g}", verdict))
    return rows


def lines(parts):
    """The goals for the screen."""
    return [
        f"{name:4} {what:58} {'' if x is None else f'{x:.3g}':>9} {bound:>9}  {verdict}"
        for name, what, x, bound, verdict in verdicts(parts)
    ]


def markdown(devices):
    """The README's table. devices: [what bench.py measured on one]: a column each, and one for the
    kind of device that was not at hand. Empty: the goal is not for this kind."""
    columns = []
    for parts in devices:
        made = next(iter(parts.values()))
        columns.append((made["device"], made["kind"], parts))
    for kind, name in (("cpu", "a CPU"), ("cuda", "a GPU")):
        if kind not in [column[1] for column in columns]:
            columns.append((name, kind, {}))
    rows = ["| | goal | bound | " + " | ".join(name for name, _, _ in columns) + " |"]
    rows.append("|---|---|--:|" + "--:|" * len(columns))
    judged = [verdicts(parts) for _, _, parts in columns]
    for i, (name, what, *_, where) in enumerate(GOALS):
        cells = []
        for (_, kind, _), column in zip(columns, judged, strict=True):
            x, verdict = column[i][2], column[i][4]
            cell = verdict if x is None else f"{x:.3g}" + ", NOT met" * (verdict != "met")
            cells.append(cell if kind in where else "")
        rows.append(f"| {name} | {what} | {judged[0][i][3]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(argv, readme=HERE.parent / "README.md", folder=HERE):
    devices = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    text = readme.read_text()
    table = f"<!-- bench -->\n{markdown(devices)}\n<!-- /bench -->"
    new, n = re.subn("<!-- bench -->.*<!-- /bench -->", lambda _: table, text, flags=re.S)
    if n != 1:
        raise ValueError(f"{readme} has no place <!-- bench --> ... <!-- /bench -->")
    if "--check" in argv and new != text:
        raise ValueError(f"{readme}: its table is not that of {folder}: python benchmarks/table.py")
    readme.write_text(new)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as e:
        sys.exit(f"table.py: {e}")
