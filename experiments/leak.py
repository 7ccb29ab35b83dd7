"""How much of the gain of memory on text is copying (Table C.2).

    python experiments/leak.py --split explicit_heldout

References that overlap the text by more than a threshold, eq. (3.3), are left out, and it is asked
by which text a chunk's memories were recalled.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run
from eval import columns, json_flag, prepare_json, write_result
from experiments.text import open_text, text_flags, text_losses
from generate import model_flags, open_model
from retrieval import Retriever, neighbors

THRESHOLDS = (None, 0.9, 0.8, 2 / 3)  # None: no filter; 0.9: training; 2/3: evaluation


def leak(model, windows, retriever, n, thresholds=THRESHOLDS):
    """The gain of memory on n windows of text, by how much a reference may copy of it.

    A reference that overlaps the window around its chunk by more than the threshold, eq. (3.3), is
    dropped, and the next best of 16 more takes its place. query_shift 0: a chunk reads what its own
    text retrieved, as in training (paper); 1: what the text before it did, as in generation.
    A gain that goes with the copies was copying.

    -> rows of dict(threshold, changed, empty: shares of the chunks; gain: [of shift 0, of 1])
    """
    without = text_losses(model, windows, n, ["none"])["none"]
    tokens = windows.tokens[: n * windows.T]
    first = None
    rows = []
    for threshold in thresholds:
        how = dict(threshold=threshold or 1.0, context=windows.T, extra=16)
        ids = neighbors(tokens, windows.C, windows.references, retriever, 1, **how)
        if first is None:
            first = ids
        windows.neighbors = ids
        gain = []
        for shift in (0, 1):
            windows.shift = shift
            gain.append(without - text_losses(model, windows, n, ["recalled"])["recalled"])
        changed = float((ids != first).mean())
        empty = float((ids < 0).mean())
        rows.append(dict(threshold=threshold, changed=changed, empty=empty, gain=gain))
    return rows


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    model_flags(p, bank=False)
    text_flags(p)
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
    references = windows.references
    retriever = Retriever.open(f"{references.path}.index", references=references)
    rows = leak(model, windows, retriever, n)
    lines = []
    for row in rows:
        limit = f"{row['threshold']:.2f}" if row["threshold"] else "no filter"
        shares = [f"{row['changed']:.3f}", f"{row['empty']:.3f}"]
        lines.append([limit, *shares, *(f"{x:.3f}" for x in row["gain"])])
    head = ["largest overlap", "neighbours changed", "none left", "gain, query_shift 0", "1"]
    print(columns(head, *lines))
    result = dict(split=a.split, windows=n, leak=rows)
    write_result(a, result)
    return result


if __name__ == "__main__":
    run(main)
