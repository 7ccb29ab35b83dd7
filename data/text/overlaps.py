"""How much of each reference that a chunk retrieves does its window contain already? (sec. 4.4)

    python data/text/overlaps.py --data out/notes --split heldout --references kb

The paper saw at least 80 % for a reference that contains a question, at most 40 % for one that is
relevant and another text, and so filters above 2/3 in evaluation and 0.9 in training, eq. (3.3).
Titles, where references have them, do not count, as in the filter of training.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import corpus  # noqa: E402
from common import check, number, run  # noqa: E402
from retrieval import Retriever, overlap  # noqa: E402


def overlaps(tokens, chunk_len, context, references, retriever, n, k, seed=0):
    """eq. (3.3) of the windows of n random chunks and each of the k references they retrieve."""
    n_chunks = len(tokens) // chunk_len
    chosen = np.random.default_rng(seed).permutation(n_chunks)[:n]
    found = []
    for chunk in tqdm(np.sort(chosen), "overlaps"):
        begin = chunk * chunk_len
        window = tokens[begin // context * context :][:context]
        ids, _ = retriever.search([tokens[begin : begin + chunk_len].tolist()], k)  # (1, k)
        found += [overlap(window, references.body(i)) for i in ids[0] if i >= 0]
    return np.array(found)


def histogram(values):
    """Lines of text: the share of the values in each tenth from 0 to 1."""
    counts, _ = np.histogram(values, bins=np.linspace(0, 1, 11))
    lines = []
    for i, count in enumerate(counts):
        share = count / max(1, len(values))
        lines.append(f"{i / 10:.1f}-{(i + 1) / 10:.1f}  {share:6.1%}  {'#' * round(50 * share)}")
    return lines


def main(argv=None):
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    p.add_argument("--data", required=True, help="a prepared data set with an index")
    p.add_argument("--split", default="heldout", help="whose chunks are the queries")
    p.add_argument("--references", default="kb", help="what they retrieve from")
    p.add_argument("--chunk_len", type=number(int, 1), default=32, help="tokens of a chunk")
    p.add_argument("--context", type=number(int, 1), default=256, help="tokens of a window")
    p.add_argument("--chunks", type=number(int, 1), default=500, help="so many, at random")
    p.add_argument("--k", type=number(int, 1), default=5, help="references a chunk")
    a = p.parse_args(argv)
    tokens = corpus.open_tokens(a.data, a.split)
    check(len(tokens) >= a.chunk_len, f"{a.data}/{a.split}.bin has no chunk of {a.chunk_len}")
    references = corpus.References.open(f"{a.data}/{a.references}")
    retriever = Retriever.open(f"{a.data}/{a.references}.index", references=references)
    lengths = (a.chunk_len, a.context)
    values = overlaps(tokens, *lengths, references, retriever, a.chunks, a.k)
    print(
        f"{a.data}: the share of each of the top {a.k} references of {a.references} that stands in "
        f"the window of {a.split} already; {len(values)} pairs"
    )
    print("\n".join(histogram(values)))
    for limit in (0.9, 2 / 3):
        print(f"above {limit:.2f}, and dropped by that filter: {(values > limit).mean():.1%}")
    return values


if __name__ == "__main__":
    run(main)
