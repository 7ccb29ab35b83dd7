"""How many of the next chunk's memories are known before the chunk is complete (sec. 3.1)?

    python experiments/speculate.py --split explicit_heldout --ahead 1 2 4 8 16

New memories are recalled once a chunk of C tokens is complete, and its tokens are the query: so the
next token has to wait for search and loading. They could go on beside the decoding if the last C
tokens so far, some tokens before the end, found the same memories. Here both queries are put, for
every chunk of a text, and the memories that they find are compared. What was guessed rightly need
not be loaded any more when the chunk is complete; the query of the complete chunk decides, so the
answers would be the same ones.

data/cities fills its chunks up with line breaks. Their last tokens would hold no words, and all be
known early; so the line breaks are dropped and the text is cut into chunks anew.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import corpus
from common import check, number, run
from eval import columns, json_flag, prepare_json, write_result
from retrieval import Retriever


def queries(tokens, chunk_len, ahead):
    """(n, C): the last C tokens, `ahead` tokens before the end of every chunk but the first.

    >>> queries(np.arange(9), 3, 1).tolist()
    [[2, 3, 4], [5, 6, 7]]
    """
    n_chunks = len(tokens) // chunk_len
    ends = np.arange(2, n_chunks + 1) * chunk_len - ahead
    return np.stack([tokens[end - chunk_len : end] for end in ends])


def unfilled(tokens, fill):
    """The tokens without the token ids `fill`.

    >>> unfilled(np.array([5, 9, 9, 7, 9]), [9]).tolist()
    [5, 7]
    """
    return tokens[~np.isin(tokens, fill)]


def found_early(early, final):
    """Of ids (n, R) that the complete chunk finds: the share that the early query has found, and
    the share of chunks where it has found all. -1 = none."""
    shares = []
    for guess, ids in zip(early, final, strict=True):
        ids = {i for i in ids.tolist() if i >= 0}
        if ids:
            shares.append(len(ids & set(guess.tolist())) / len(ids))
    return float(np.mean(shares)), float(np.mean([share == 1 for share in shares]))


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    size = number(int, 1)
    p.add_argument("--data", default="data/cities", help="a prepared data set")
    p.add_argument("--references", default="kb", help="its references; they need an index")
    p.add_argument("--split", default="explicit_heldout", help="the text")
    p.add_argument("--chunks", type=size, default=500, help="how many chunks of it")
    p.add_argument("--chunk_len", type=size, default=32, help="C, tokens of a chunk")
    p.add_argument("--n_recall", type=size, default=5, help="R, memories of a chunk")
    fill = "what fills chunks up is dropped ('': nothing is)"
    p.add_argument("--fill", default="\n", help=fill)
    p.add_argument("--ahead", type=size, nargs="+", default=[1, 2, 4, 8, 16], help="tokens")
    json_flag(p)
    return p


def main(argv=None):
    a = parser().parse_args(argv)
    prepare_json(a)
    furthest = max(a.ahead)
    check(furthest <= a.chunk_len, f"--ahead {furthest}: a chunk has {a.chunk_len} tokens")
    references = corpus.References.open(f"{a.data}/{a.references}")
    retriever = Retriever.open(f"{references.path}.index", references=references)
    tokens = np.asarray(corpus.open_tokens(a.data, a.split))
    fill = retriever.tokenizer.encode(a.fill) if a.fill else []
    tokens = unfilled(tokens, fill)[: (a.chunks + 1) * a.chunk_len]
    check(len(tokens) >= 2 * a.chunk_len, f"{a.data}/{a.split}.bin: fewer than two chunks")
    started = time.perf_counter()
    final = retriever.search(queries(tokens, a.chunk_len, 0), a.n_recall)[0]  # (n, R)
    seconds = time.perf_counter() - started
    print(f"{len(final)} chunks of {a.data}/{a.split}, top {a.n_recall} of {len(references):,}")
    rows = []
    for ahead in sorted(a.ahead):
        early = retriever.search(queries(tokens, a.chunk_len, ahead), a.n_recall)[0]  # (n, R)
        share, every = found_early(early, final)
        rows.append(dict(ahead=ahead, found=share, all_found=every))
    lines = [["tokens before the end", "memories found already", "chunks with all of them"]]
    for row in rows:
        lines.append([str(row["ahead"]), f"{row['found']:.3f}", f"{row['all_found']:.3f}"])
    print(columns(*lines))
    print(f"searching together: {1e3 * seconds / len(final):.2f} ms a chunk")
    result = dict(split=a.split, chunks=len(final), rows=rows, search_ms=1e3 * seconds / len(final))
    write_result(a, result)
    return result


if __name__ == "__main__":
    run(main)
