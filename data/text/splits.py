"""What becomes of each document: training text, knowledge base, held out, or left out.

Documents are few numbers here, not texts: 25 bytes each, so that millions fit into memory.
    digest     uint64, the same for copies of a text
    place      uint64, a hash of where the document stands: an order of chance, always the same
    share      float32 from 0 to 1, another hash of it: is it in --kb share:0.3?
    in_kb      bool, is it in the folder that --kb names?
    score      float32, its quality
    signature  (128,) uint32, its MinHash, only with --near
"""

import numpy as np
from tqdm import tqdm

from common import check

# The roles. KB: its references are in the knowledge base, too.
DROPPED = 0
TRAIN = 1
TRAIN_AND_KB = 2
HELDOUT = 3  # in the knowledge base only
VAL = 4  # in neither
PERMUTATIONS = 128  # of a MinHash


def choose_roles(about, options, counts):
    """The role of every document, (n,) uint8. about: the arrays above; counts: what was left out,
    and why, is added to it. UserError if nothing is left for training."""
    in_kb = is_in_kb(about, options.kb)  # (n,) bool
    alive = without_copies(about, in_kb, options, counts)  # (n,) bool
    if options.quality:
        alive = the_best(about["score"], alive, options.keep, counts)
    kept = np.flatnonzero(alive)
    check(len(kept), _nothing_left(counts))
    order = kept[np.argsort(about["place"][kept], kind="stable")]

    of_kb = order[in_kb[order]]
    check(len(of_kb), f"--kb {options.kb}: none of the {len(order):,} documents is among these")
    roles = np.full(len(alive), DROPPED, np.uint8)
    roles[order] = np.where(in_kb[order], TRAIN_AND_KB, TRAIN)
    n_heldout = how_many(options.heldout, len(of_kb))
    line = f"--heldout {options.heldout:g}: training has no document of the knowledge base left"
    check(n_heldout < len(of_kb), f"{line} to retrieve from: give a smaller share")
    roles[of_kb[:n_heldout]] = HELDOUT
    rest = order[roles[order] != HELDOUT]
    n_val = how_many(options.val, len(rest))
    rest = rest[rest != of_kb[-1]]  # the one that training keeps in any case
    line = f"--val {options.val:g}: no training text is left: give a smaller share"
    check(n_val <= len(rest), line)
    roles[rest[:n_val]] = VAL

    n_of = np.bincount(roles, minlength=5)
    counts["kept"] = len(order)
    counts["of the training text"] = int(n_of[TRAIN] + n_of[TRAIN_AND_KB])
    counts["of the knowledge base"] = int(n_of[HELDOUT] + n_of[TRAIN_AND_KB])
    counts["in the knowledge base only"] = int(n_of[HELDOUT])
    counts["in neither"] = int(n_of[VAL])
    return roles


def without_copies(about, in_kb, options, counts):
    """Which documents are no copies of an earlier one (sec. 4.2): (n,) bool. Of copies one that is
    knowledge base stays, if there is one."""
    order = np.argsort(~in_kb, kind="stable")  # (n,): those of the knowledge base are first
    digest = about["digest"][order]
    _, first = np.unique(digest, return_index=True)  # where each digest occurs first
    alive = np.zeros(len(digest), bool)
    alive[order[first]] = True
    counts["exact duplicates"] = len(digest) - len(first)
    if options.near:
        left = order[alive[order]]
        copies = near_duplicates(about["signature"], left, options.near)
        alive[copies] = False
        counts["near-duplicates"] = len(copies)
    return alive


def near_duplicates(signatures, order, threshold):
    """Which of the documents `order` are nearly the copy of one before them there: their numbers.

    signatures (n, 128): two texts of Jaccard similarity J agree in about a share J of a row. Only
    those are compared that agree in one of 32 bands of 4: at J = 0.7 all but 1 pair in 5,000.
    """
    band = 4
    first = {}  # (where, what is there): the first document with it
    copies = []
    for i in tqdm(order.tolist(), "near-duplicates"):
        row = signatures[i]
        keys = [(at, row[at : at + band].tobytes()) for at in range(0, PERMUTATIONS, band)]
        others = sorted({first[key] for key in keys if key in first})
        if any((signatures[other] == row).mean() >= threshold for other in others):
            copies.append(i)
            continue
        for key in keys:
            first.setdefault(key, i)
    return np.array(copies, int)


def the_best(score, alive, keep, counts):
    """Of the documents that are alive, the share `keep` with the highest scores: (n,) bool."""
    if not alive.any():
        return alive
    limit = np.quantile(score[alive], 1 - keep)
    best = alive & (score >= limit)
    counts[f"quality below {limit:.2f}"] = int(alive.sum() - best.sum())
    return best


def is_in_kb(about, kb):
    """Which documents --kb means: all, share:X, or a folder's. (n,) bool."""
    if kb == "all":
        return np.ones(len(about["share"]), bool)
    if kb.startswith("share:"):
        return about["share"] < float(kb.removeprefix("share:"))
    return about["in_kb"]


def how_many(share, n):
    """A share of n, as a number: at least one, if the share is above 0 and there are two or more.

    >>> how_many(0.05, 200), how_many(0.05, 3), how_many(0, 200), how_many(0.05, 1)
    (10, 1, 0, 0)
    """
    if share == 0 or n < 2:
        return 0
    return min(max(1, round(share * n)), n)


def _nothing_left(counts):
    said = ", ".join(f"{n:,} {why}" for why, n in counts.items() if n)
    return f"no document is left ({said}); give other text, or --min_words 1 and the like"
