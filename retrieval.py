"""Retrieval: which reference a chunk should recall (sec. 3.1) and which it must not see (sec. 3.6).

overlap      eq. (3.3): how much of a reference a train sequence already contains
embedder     text -> unit vector; the same object embeds references and queries
Retriever    a FAISS index of references with its embedder, in one directory
Live         the Retriever of a knowledge base that changes
neighbors    for every training chunk, the best references that are no copies of its text

Whatever has .search(queries, k) -> ids (n, k), scores (n, k) is a source of memories. An id of -1
means that nothing was found; no memory is recalled in its place.
"""

import argparse
import fcntl
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import corpus
import inside
from common import (
    UserError,
    check,
    command,
    lock,
    number,
    optional,
    read_array,
    read_bytes,
    read_json,
    read_sealed,
    replace_file,
    run,
    shard,
    torchrun_share,
    write_json,
    write_sealed,
)
from embed import (
    KINDS,
    HashEmbedder,
    digest,
    embedder,
    lower_words,
    normalize,
    small_words,
    words,
)
from index import (
    BATCH,
    FIT,
    FORMAT,
    META,
    NOTHING,
    best_of,
    cure_for,
    encode_shard,
    exact_index,
    inner_index,
    is_index,
    join,
    open_index,
    prepare,
    search,
    share_of,
)
from model import load_checkpoint

WAIT = 30  # seconds to wait for another process that is making the same index
MANY = 100_000  # texts, from which on several processes embed them
FEW = 1000  # up to so many changes of a knowledge base never make its index worth a new one

# -- How much of a reference stands in a text: eq. (3.3) ----------------------------------------


def common_subsequence(t, r):
    """The length of the longest common subsequence of t and r, by its plain recurrence.

        L[i, j] = L[i-1, j-1] + 1                   if t_i = r_j
                  max(L[i-1, j], L[i, j-1])         else

    `overlap` computes the same with fewer operations; the tests compare the two.
    >>> common_subsequence([9, 1, 0, 2, 3], [1, 2, 3])
    3
    """
    # row[j] = L[i, j]: between what was read of t and the first j tokens of r
    row = [0] * (len(r) + 1)
    for x in t:
        above = row
        row = [0]
        for j, y in enumerate(r):
            if x == y:
                row.append(above[j] + 1)
            else:
                row.append(max(above[j + 1], row[j]))
    return row[-1]


def overlap(t, r):
    """The share of reference r that stands, in order, in one window of train sequence t: eq. (3.3).

        max N with t_{i_k} = r_{j_k}, k = 1..N, both rising, i_N - i_1 <= 2|r|;   over |r|

    (The paper prints r_{i_k}, an erratum.) t, r: token ids. Exact, in [0, 1]; UserError if r is
    empty. Where |r| = 3, a window has 7 tokens:
    >>> overlap([9, 1, 0, 0, 2, 0, 0, 3, 9], [1, 2, 3])
    1.0
    >>> round(overlap([9, 1, 0, 0, 2, 0, 0, 0, 3, 9], [1, 2, 3]), 3)
    0.667
    """
    t = np.asarray(t).tolist()
    r = np.asarray(r).tolist()
    check(r, "overlap with an empty reference: eq. (3.3) divides by its length")
    return _best_window(t, r, floor=0, enough=len(r)) / len(r)


def exceeds(t, r, threshold):
    """Whether overlap(t, r) > threshold (paper: 0.9 in training, sec. 3.6; 2/3 in evaluation, sec.
    4.4). It computes the exact overlap only where nothing cheaper decides."""
    t = np.asarray(t).tolist()
    r = np.asarray(r).tolist()
    check(r, "overlap with an empty reference: eq. (3.3) divides by its length")
    above = [n for n in range(len(r) + 1) if n / len(r) > threshold]  # the N that exceed it
    if not above:
        return False
    enough = above[0]
    shared = Counter(t) & Counter(r)
    if shared.total() < enough:  # an upper bound: the tokens they share in any order
        return False
    return _best_window(t, r, floor=enough - 1, enough=enough) >= enough


def _best_window(t, r, floor, enough):
    """The N of eq. (3.3): at least `floor`, and no more exact once it has reached `enough`.

    In a row of the table of `common_subsequence` the numbers rise by 0 or 1 from column to column,
    so |r| bits say all about a row: bit j is 0 where it rises at r_j. A new token moves each rise
    to the first match after the rise before it. One addition does that for the whole row: its
    carry starts at a match, runs through the ones and stops at the rise. So a token costs three
    operations on |r|-bit integers (Crochemore et al. 2001) instead of |r| comparisons.
    """
    n = len(r)
    width = 2 * n + 1
    full = (1 << n) - 1
    places = {}  # token -> the bits of its places in r
    for j, token in enumerate(r):
        places[token] = places.get(token, 0) | 1 << j
    match = [places.get(token, 0) for token in t]  # |t| integers: where in r this token stands
    best = floor
    start = 0
    while start <= max(0, len(t) - width) and best < enough:
        flat = full  # of the row above the first token: nowhere a rise
        for hits in match[start : start + width]:
            moved = flat & hits
            flat = (flat + moved) | (flat - moved)  # what is carried beyond bit n never comes back
        length = n - (flat & full).bit_count()
        # If a window moves by one token, its N changes by at most one. So where N is x short of the
        # best, the next x windows cannot be better.
        start += 1 + max(0, best - length)
        best = max(best, length)
    return best


# -- The index --------------------------------------------------------------------------------


def as_texts(queries, tokenizer):
    """Queries, texts or token sequences, as normalized texts."""
    if hasattr(queries, "tolist"):
        queries = queries.tolist()
    texts = []
    for query in queries:
        if not isinstance(query, str):
            query = tokenizer.decode(query)
        texts.append(normalize(query))
    return texts


class Retriever:
    """An index that finds references by text; the id of a reference is its row.

        index.faiss     the vectors of references 0..n-1, as they were when the index was made
        embedder.npy    what the embedder has learnt from them
        meta.json       which index, embedder, tokenizer and references belong together
        changes.npz     what was added, removed and replaced since

    A change costs the same whatever n is: the index itself stays as it is. A row that is removed is
    hidden, and a new vector goes into a small exact index beside it, which is searched as well.
    """

    def __init__(self, path, index, embedder, tokenizer, meta):
        self.path = path
        self.index = index  # a faiss.Index of rows 0..n-1
        self.meta = meta
        self.embedder = embedder  # of the references and of the queries
        self.tokenizer = tokenizer  # of queries that are tokens
        self.fresh = None  # a faiss.IndexIDMap2 of the vectors that are new, once there are any
        self.blank = set(meta["blank"])  # ids of texts without any word: never found
        self.hidden = set(self.blank)  # rows of the index that are no longer to be found
        self.version = 0  # of changes.npz

    def __len__(self):
        fresh = self.fresh.ntotal if self.fresh else 0
        return self.index.ntotal - len(self.hidden) + len(self.blank) + fresh

    @property
    def n_changes(self):
        """Vectors that were added or hidden since the index was made."""
        fresh = self.fresh.ntotal if self.fresh else 0
        return fresh + len(self.hidden) - len(self.meta["blank"])

    @staticmethod
    def build(
        path, references, tokenizer_name, encoder="hash", factory=None, progress=True, on_disk=False
    ):
        """Indexes a corpus.References (id = row) and writes the directory `path`. If it is stopped,
        the next call goes on where it was.

        encoder: an embedder or its name. factory: a FAISS factory string instead of our choice.
        on_disk: see index.join.
        """
        model = encode_shard(path, references, tokenizer_name, encoder, factory, (1, 1), progress)
        join(path, references, progress, on_disk)
        return Retriever.open(path, model, references)

    @staticmethod
    def open(path, encoder=None, references=None, model=None):
        """Opens an index. encoder: an embedder or its name, instead of that of the index.
        references: those that the ids are to name. model: for an index of its own keys
        (`--embedder self:LAYER.HEAD`); what comes back is then an inside.KeyRetriever. UserError
        without an index, or if its parts, or it and the references, do not belong together."""
        path = Path(path)
        cure = cure_for(path)
        check(is_index(path), f"{path}: no index here; {cure}")
        if read_json(path / "meta.json", dict(format=str), cure)["format"] == inside.FORMAT:
            return inside.KeyRetriever.open(path, model, references=references)
        meta = read_sealed(path / "meta.json", META, cure)
        check(meta["format"] == FORMAT, f"{path} is a {meta['format']}, not {FORMAT}; {cure}")
        cure = cure_for(path, meta["embedder"])
        state = read_array(path / "embedder.npy", "<u4", (None,), cure)
        encoder = encoder or meta["embedder"]
        if isinstance(encoder, str) and encoder.startswith("hash"):
            valid = len(state) == HashEmbedder.BUCKETS + 1
            check(valid, f"{path}/embedder.npy is damaged: {len(state)} numbers; {cure}")
        model = embedder(encoder, state)
        name = meta["tokenizer"]
        tokenizer = corpus.tokenizer(path.parent if name == ".." else name)
        for kind, converted in dict(embedder=model.id, tokenizer=tokenizer.id).items():
            made_with = meta[f"{kind}_id"]
            line = f"{path}: {kind} {made_with} and {converted} do not compare; {cure}"
            check(made_with == converted, line)
        index = open_index(path / "index.faiss", meta, cure, True)
        retriever = Retriever(path, index, model, tokenizer, meta)
        retriever._read_changes(cure)
        valid = references is None or references.hash == meta["references"]
        check(valid, f"{path} is stale: its references have changed since; {cure}")
        return retriever

    def search(self, queries, k):
        """The k references most similar to each query (cosine, sec. 3.1), best first.

        queries: n texts, or n token sequences: lists, or integers (n, m) with -1 = padding.
        Returns ids (n, k) int64 and scores (n, k) float32. A reference that scores 0 or less has
        nothing in common with the query and is not found: id -1, score NOTHING. So a query without
        any word finds nothing, and k may be more than there are references.
        """
        check(k >= 1, f"{self.path}: {k} references asked for; ask for 1 or more")
        check(not isinstance(queries, str), "search takes a list of texts, not one text")
        vectors = self._embed(as_texts(queries, self.tokenizer))  # (n, dim)
        finite = np.isfinite(vectors).all(1)
        vectors[~finite] = 0  # scores 0 with everything
        ids, scores = self._search_rows(vectors, k)
        if self.fresh is not None:
            found, cosines = search(self.fresh, vectors, k)
            ids = np.concatenate([ids, found], 1)  # (n, 2k)
            scores = np.concatenate([scores, cosines], 1)
            ids, scores = best_of(ids, scores, k)
        nothing = ~(scores > 0)
        ids[nothing] = -1
        scores[nothing] = NOTHING
        return ids, scores

    def _embed(self, texts):
        vectors = np.array(self.embedder.encode(texts), np.float32)
        valid = vectors.shape == (len(texts), self.embedder.dim)
        check(valid, f"embedder {self.embedder.name} gives {vectors.shape} for {len(texts)} texts")
        return vectors

    def _search_rows(self, vectors, k):
        """The k best rows of the index that are not hidden; -inf where there are no more."""
        hidden = np.fromiter(self.hidden, np.int64, len(self.hidden))  # (any number,)
        most = k
        while True:
            ids, scores = search(self.index, vectors, most)  # (n, most)
            is_hidden = np.isin(ids, hidden)  # (n, most)
            n_found = ((ids >= 0) & ~is_hidden).sum(1)  # (n,)
            # (n,): the search gave all it had; an inverted file looks into some lists only
            exhausted = (ids < 0).any(1) | (most >= self.index.ntotal)
            if (exhausted | (n_found >= k)).all():
                break
            most = 4 * most  # hidden rows stood in the way
        scores[is_hidden] = -np.inf
        return best_of(ids, scores, k)

    def _has(self, i):
        """Whether reference i is there, found or blank."""
        row = 0 <= i < self.index.ntotal and i not in self.hidden
        return row or i in self.blank or self._is_fresh(i)

    def _is_fresh(self, i):
        if self.fresh is None:
            return False
        try:
            self.fresh.reconstruct(int(i))
        except RuntimeError:
            return False
        return True

    def add(self, ids, texts):
        """Adds references. As after remove and replace, only save() writes the change to disk."""
        there = [i for i in ids if self._has(i)]
        check(not there, f"{self.path}: references {there} are there already: replace them")
        self._put(ids, self._new_vectors(ids, texts))

    def remove(self, ids):
        """Forgets references: no search finds them. Their old vectors stay in index.faiss, hidden,
        until the index is made anew."""
        self._check_known(ids)
        self._hide(ids)

    def replace(self, ids, texts):
        self._check_known(ids)
        vectors = self._new_vectors(ids, texts)  # first: what is refused changes nothing
        self._hide(ids)
        self._put(ids, vectors)

    def update(self, ids, texts):
        """Gives references these texts, whether they are there or not; "" forgets one. So an index
        catches up with changes made elsewhere."""
        vectors = self._new_vectors(ids, texts)
        self._hide(ids)
        self._put(ids, vectors)
        gone = [int(i) for i, text in zip(ids, texts, strict=True) if not text]
        self.blank.difference_update(gone)

    def _check_known(self, ids):
        unknown = [i for i in ids if not self._has(i)]
        check(not unknown, f"{self.path} has no references {unknown} to remove or replace")
        check(len(set(ids)) == len(ids), f"{self.path}: an id twice: {list(ids)}")

    def _new_vectors(self, ids, texts):
        """The vectors of new texts (n, dim). UserError for ids or texts that do not fit."""
        ids = list(ids)
        one_each = not isinstance(texts, str) and len(ids) == len(texts)
        check(one_each, "give one text for each id")
        check(len(set(ids)) == len(ids), f"{self.path}: an id twice: {ids}")
        check(all(i >= 0 for i in ids), f"{self.path}: ids are at least 0: {ids}")
        texts = [normalize(text) for text in texts]
        vectors = self._embed(texts)  # (n, dim)
        line = f"embedder {self.embedder.name} gives NaN for one of the texts of {ids}"
        check(np.isfinite(vectors).all(), line)
        return vectors

    def _put(self, ids, vectors):
        """Takes in vectors (n, dim) of references that are not there; 0: a text without a word."""
        ids = np.array(ids, np.int64)
        has_word = vectors.any(1)  # (n,)
        self.blank.update(ids[~has_word].tolist())
        if self.fresh is None:
            self.fresh = exact_index(self.embedder.dim)
        self.fresh.add_with_ids(vectors[has_word], ids[has_word])

    def _hide(self, ids):
        """Forgets those of the references that are there."""
        fresh = [i for i in ids if self._is_fresh(i)]
        if fresh:
            self.fresh.remove_ids(np.array(fresh, np.int64))
        for i in ids:
            self.blank.discard(int(i))
            if i < self.index.ntotal:
                self.hidden.add(int(i))

    def save(self, references=None):
        """Writes the changes, not the index, so it takes as long as there are changes. references:
        the references as they are after them. UserError if another process has saved changes since
        this index was opened."""
        if references is not None:
            self.meta["references"] = references.hash
        if self.fresh is None:
            self.fresh = exact_index(self.embedder.dim)
        vectors = inner_index(self.fresh.index).reconstruct_n(0, self.fresh.ntotal)
        arrays = dict(
            base=np.array(self.meta["checksum"], np.int64),
            version=np.array(self.version + 1, np.int64),
            references=np.array(self.meta["references"]),
            hidden=np.array(sorted(self.hidden), np.int64),
            blank=np.array(sorted(self.blank), np.int64),
            ids=optional("faiss").vector_to_array(self.fresh.id_map),
            vectors=vectors.reshape(-1, self.embedder.dim),
        )
        with lock(self.path):  # between looking and writing nobody else writes
            on_disk = self._changes(cure_for(self.path, self.embedder.name))
            version = int(on_disk["version"]) if on_disk else 0
            line = f"{self.path} was changed by another process since it was opened: open it again"
            check(version == self.version, line)
            replace_file(Path(self.path, "changes.npz"), lambda file: np.savez(file, **arrays))
        self.version += 1
        return self

    def _changes(self, cure):
        """The arrays of changes.npz, or None where nothing has changed since the index was made."""
        path = Path(self.path, "changes.npz")
        kinds = dict(base="i", version="i", references="U", hidden="i", blank="i", ids="i")
        kinds["vectors"] = "f"
        if not path.exists():
            return None
        data = read_bytes(path, cure)
        try:
            file = np.load(io.BytesIO(data), allow_pickle=False)
            arrays = {name: file[name] for name in kinds}
        except Exception as error:  # NumPy's, zipfile's and zlib's own kinds of it
            raise UserError(f"{path} is damaged ({type(error).__name__}); {cure}") from None
        valid = all(arrays[name].dtype.kind == kind for name, kind in kinds.items())
        valid = valid and arrays["vectors"].shape == (len(arrays["ids"]), self.embedder.dim)
        check(valid, f"{path} is damaged; {cure}")
        if int(arrays["base"]) != self.meta["checksum"]:
            return None  # they belong to an older index
        return arrays

    def _read_changes(self, cure):
        arrays = self._changes(cure)
        if arrays is None:
            return
        self.version = int(arrays["version"])
        self.meta["references"] = str(arrays["references"])
        self.hidden = set(arrays["hidden"].tolist())
        self.blank = set(arrays["blank"].tolist())
        self.fresh = exact_index(self.embedder.dim)
        self.fresh.add_with_ids(arrays["vectors"].astype(np.float32), arrays["ids"])


# -- The index of a knowledge base that changes -------------------------------------------------


class Frozen:
    """The texts of a knowledge base, with the hash and length of now, whatever changes later."""

    def __init__(self, references):
        self.references = references
        self.path = references.path
        self.hash = references.hash  # before anything is read
        self.n = len(references)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.references[i]


def put_in_place(path):
    """Puts the whole index beside `path`, index.new, into its place. A directory cannot replace
    another in one step: a kill between the two renames leaves the old one in index.old, from where
    `put_back` brings it. The caller holds the lock."""
    old = path.with_name("index.old")
    put_back(path)  # the only whole one must not be removed below
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    path.with_name("index.new").rename(path)
    shutil.rmtree(old, ignore_errors=True)


def put_back(path):
    """Mends what a kill in `put_in_place` left. The caller holds the lock."""
    old = path.with_name("index.old")
    if not is_index(path) and is_index(old):
        shutil.rmtree(path, ignore_errors=True)
        old.rename(path)


def choice(base):
    """The embedder and the factory that were chosen for the index of the knowledge base `base`, be
    it elsewhere or unfinished since a kill. Factory None: by size."""
    for name in ("index/meta.json", "index.old/meta.json", "index.new/parts/plan.json"):
        file = Path(base, name)
        if file.exists():
            made = read_sealed(file, dict(embedder=str), cure_for(Path(base, "index")))
            return made["embedder"], made.get("chosen")
    return "hash", None


def check_pieces(references, path, encoder, ids):
    """UserError if one of `ids` is a piece of a document (Remark 3.2): the keys of its memory, and
    of those of the pieces after it, are not what the model makes of it alone."""
    first = min(ids, default=math.inf)
    alone = first >= references.meta.get("n_pieces", 0)
    line = f"{path}: the keys of reference {first}, a piece of a document, depend on the others"
    check(alone, f"{line}; {cure_for(path, encoder)}")


def read_whole(path, model):
    """Opens an index that another process may put a new one in the place of meanwhile: files of two
    of them do not fit together, so it is read again."""
    while True:
        before = stamp(path)
        try:
            return Retriever.open(path, model=model)
        except UserError:
            if stamp(path) == before:
                raise


def stamp(path):
    """Changes whenever another index is put at `path`."""
    file = Path(path, "meta.json")
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


class Live:
    """Finds the references of a knowledge base (bank.Texts) as they are, whoever changes them.

    It has a Retriever in the base's directory `index`, and takes in all changes whenever it opens
    or searches; a change costs one embedding, whatever N is. A deleted reference is no longer
    found; its vector leaves the disk when the index is made anew. What `calibrate` has learnt is
    read when it opens.
    """

    def __init__(self, retriever, references):
        self.retriever = retriever
        self.references = references
        self.path = retriever.path
        self.meta = retriever.meta
        self.embedder = retriever.embedder
        self.tokenizer = retriever.tokenizer
        # "id of the base:version of the texts that are in here"
        self.base, _, version = retriever.meta["references"].rpartition(":")
        self.version = int(version) if version.isdigit() else 0
        self.relevance = Relevance.open(references.path)

    def __len__(self):
        return self.references.count_live()

    @staticmethod
    def build(references, encoder=None, factory=None, progress=True, model=None, bank=None):
        """Indexes a knowledge base anew. The old index serves until the new one is whole.
        encoder None: the embedder, and without `factory` the factory, that were chosen for the old
        one. model: for the encoder self:LAYER.HEAD; bank: its memories, where they are written
        already."""
        with lock(references.path, WAIT):  # one process at a time
            if encoder is None:
                encoder, chosen = choice(references.path)
                factory = factory or chosen
            return Live._build(references, encoder, factory, progress, model, bank)

    @staticmethod
    def _build(references, encoder, factory, progress=True, model=None, bank=None):
        """`build`, by whoever holds the lock of the directory."""
        path = Path(references.path, "index")
        new = path.with_name("index.new")
        how = Frozen(references), str(references.path), encoder
        if isinstance(encoder, str) and encoder.startswith("self:"):
            if bank is None:  # each reference is written alone
                check_pieces(references, path, encoder, range(len(references)))
            shutil.rmtree(new, ignore_errors=True)  # of another kind, unfinished
            made = inside.KeyRetriever.build(new, *how, model, bank, progress)
        else:
            for left in new.glob("*.tmp"):
                left.unlink()  # by a kill, of an index of another kind
            made = Retriever.build(new, *how, factory, progress)
        put_in_place(path)
        made.path = path
        return Live(made, references)

    @staticmethod
    def exists(references):
        """Whether there is an index. If a kill has left it beside its place, it goes back first."""
        path = Path(references.path, "index")
        if not is_index(path) and references.writable:
            with lock(references.path, WAIT):  # whoever is just renaming it has done so then
                put_back(path)
        return is_index(path)

    @staticmethod
    def open(references, model=None):
        """The index of a knowledge base; where there is none, it is made. model: for an index of
        its own keys. UserError where it is of other texts, or damaged."""
        path = Path(references.path, "index")
        name = str(references.path)
        if not Live.exists(references):
            line = f"{path}: there is no index yet; it is made of {len(references):,} texts"
            if references.writable:
                with lock(references.path, WAIT):
                    if not is_index(path):  # else another process was quicker
                        print(line)
                        return Live._build(references, *choice(name), model=model)
            elif is_index(path.with_name("index.old")):
                path = path.with_name("index.old")
            else:
                print(line)
                with tempfile.TemporaryDirectory() as folder:  # a medium that can only be read
                    return Live(Retriever.build(folder, Frozen(references), name), references)
        live = Live(read_whole(path, model), references)
        of_these = references.hash.startswith(f"{live.base}:")
        of_these = of_these and live.version <= references.version
        check(of_these, f"{path} is of other texts than those beside it; {cure_for(path)}")
        live.refresh()
        return live

    def refresh(self):
        """Takes in what any process has changed since the last call."""
        if self.references.version == self.version:
            return
        changed = self.references.changed_since(self.version)
        keys = isinstance(self.retriever, inside.KeyRetriever)
        if keys:
            ids = [text.id for text in changed]
            check_pieces(self.references, self.path, self.embedder.name, ids)
        for start in range(0, len(changed), BATCH):
            texts = []
            part = changed[start : start + BATCH]
            for text in part:
                live = self.references.tokens(text) if text.live else []
                texts.append(live if keys else self.tokenizer.decode(live))
            self.retriever.update([text.id for text in part], texts)
        self.version = max(text.version for text in changed)

    def search(self, queries, k):
        """As Retriever.search, in the texts as they are now. Once `calibrate` has learnt what an
        answerable question looks like, nothing is found for one that is not."""
        return self.judge(queries, *self.nearest(queries, k))

    def nearest(self, queries, k):
        """As Retriever.search, in the texts as they are now: the most similar ones, whether they
        are about the query or not."""
        self.refresh()
        return self.retriever.search(queries, k)

    def judge(self, queries, ids, scores):
        """ids and scores (n, k), without those of queries about which nothing was found."""
        if self.relevance:
            found = self.found_texts(ids)
            evidence = self.relevance.evidence(self.texts_of(queries), found)  # (n,)
            unknown = evidence < self.relevance.least
            ids[unknown] = -1
            scores[unknown] = NOTHING
        return ids, scores

    def texts_of(self, queries):
        """Queries, texts or tokens, as texts."""
        return as_texts(queries, self.tokenizer)

    def found_texts(self, ids):
        """ids (n, k) -> for each query, the texts of what was found."""
        names = np.unique(ids[ids >= 0])
        text_of = {}
        for text in self.references.rows(names):
            text_of[text.id] = self.tokenizer.decode(self.references.tokens(text))
        return [[text_of[i] for i in row if i >= 0] for row in ids.tolist()]

    def calibrate(self, answerable, unanswerable=(), keep=0.95, k=5):
        """Learns to tell when no reference is about a question, and stores that with the base.

        answerable: [(question, id of the reference that answers it), ...]. unanswerable: questions
        that no reference answers; if there are none, the answerable ones serve, as if their
        references were missing. keep: the share of the answerable that must find something.
        Returns the share of each kind that finds something, measured on every second question after
        learning from the others. What is stored is learnt from all.
        """
        check(len(answerable) > 1, "calibrate: give at least 2 questions")
        line = "calibrate: give no question that no reference answers, or at least 2"
        check(len(unanswerable) != 1, line)
        self.refresh()
        unanswerable = [(question, None) for question in unanswerable]
        known = count_words(self.references, self.tokenizer)[:2]
        self.relevance = self._learn(known, answerable[::2], unanswerable[::2], keep, k)
        kept = self.share_found(answerable[1::2], k)
        if unanswerable:
            wrong = self.share_found(unanswerable[1::2], k)
        else:
            wrong = self.share_found(answerable[1::2], k, missing=True)
        self.relevance = self._learn(known, answerable, unanswerable, keep, k)
        self.save_relevance()
        return kept, wrong

    def save_relevance(self):
        """Saves what `calibrate` has learnt, with the words of the texts as they are now: of those
        that stand in none, as of deleted ones, nothing is kept."""
        with lock(self.references.path, WAIT):
            known, n_texts, there = count_words(self.references, self.tokenizer)
            asked = {word: n for word, n in self.relevance.asked.items() if word in there}
            self.relevance = Relevance(known, n_texts, asked, self.relevance.least)
            self.relevance.save(self.references.path)

    def _learn(self, known, answerable, unanswerable, keep, k):
        """The Relevance that lets `keep` of the answerable questions find something."""
        made = Relevance(*known, asked_words([*answerable, *unanswerable]), 0.0)
        evidence = np.sort(self._evidence(made, answerable, k))  # (n,)
        # a little lower: what the words of these questions have added is not there in other words
        lowest = min(int((1 - keep) * len(evidence)), len(evidence) - 1)
        made.least = 0.97 * float(evidence[lowest])
        return made

    def share_found(self, asked, k=5, missing=False):
        """The share of questions that find something; asked: [(question, id of the reference that
        answers it or None), ...]; missing: as if those references were not there."""
        evidence = self._evidence(self.relevance, asked, k, missing)  # (n,)
        return float((evidence >= self.relevance.least).mean())

    def _evidence(self, relevance, asked, k, missing=False):
        """What speaks for the best text that each question finds, (n,)."""
        questions = [normalize(question) for question, _ in asked]
        ids, _ = self.retriever.search(questions, k + 1)
        if missing:
            answers = [-1 if i is None else i for _, i in asked]
            ids = np.where(ids == np.array(answers)[:, None], -1, ids)
        else:
            ids = ids[:, :k]
        return relevance.evidence(questions, self.found_texts(ids))

    def save(self):
        """Saves the vectors of what has changed, so that the next process need not embed it. If
        half of all has changed, the index is made anew, for an embedder learns from its texts.
        Returns the Live to go on with."""
        self.refresh()
        if self.relevance and abs(len(self) - self.relevance.n_texts) > len(self) // 10:
            self.save_relevance()  # how rare a word is has changed
        retriever = self.retriever
        if retriever.n_changes > max(FEW, len(self) // 2):
            model = getattr(retriever, "model", None)  # a KeyRetriever's
            return Live.build(self.references, model=model)
        state = f"{self.base}:{self.version}"
        if retriever.meta["references"] == state:
            return self  # nothing has changed
        retriever.meta["references"] = state
        try:
            if isinstance(retriever, inside.KeyRetriever):
                self._save_keys()
            else:
                retriever.save()
        except UserError:  # another process has saved: what it lacks will be embedded at opening
            pass
        return self

    def _save_keys(self):
        """Writes an index of keys, which has its changes in itself, beside the old one."""
        new = self.path.with_name("index.new")
        with lock(self.references.path, WAIT):
            on_disk = read_json(self.path / "meta.json", dict(checksum=int), "")
            same = on_disk["checksum"] == self.meta["checksum"]
            check(same, f"{self.path}: another process has saved it")
            shutil.rmtree(new, ignore_errors=True)
            self.retriever.path = new
            self.retriever.save()
            put_in_place(self.path)
            self.retriever.path = self.path


def count_words(references, tokenizer):
    """In how many texts each word stands, if in more than one; the number of texts; all words. Of a
    very large base, those of an even sample of its texts."""
    ids = references.live()
    ids = ids[np.linspace(0, len(ids) - 1, min(len(ids), FIT)).astype(np.int64)]
    counts = Counter()
    for start in range(0, len(ids), BATCH):
        for text in references.rows(ids[start : start + BATCH]):
            counts.update(set(words(tokenizer.decode(references.tokens(text)))))
    return {word: n for word, n in counts.items() if n > 1}, len(ids), set(counts)


def asked_words(asked):
    """With how many different answers each word is asked for, if with more than one.
    asked: [(question, id or None), ...]; each question without an answer counts as another one."""
    answers = {}
    for n, (question, i) in enumerate(asked):
        key = ("none", n) if i is None else i
        for word in set(words(question)):
            answers.setdefault(word, set()).add(key)
    return {word: len(found) for word, found in answers.items() if len(found) > 1}


class Relevance:
    """Tells whether what was found is about the question at all.

    What speaks for a text are the words that it shares with the question; all others say nothing,
    so that a question may be asked in words that nobody has asked in before. A shared word weighs

        log((texts + 2) / (texts with the word + 1)) / answers that are asked for with the word

    over the same of a word that one text has: so a name weighs 1, however many texts there are, and
    a word of every text or of every question little. A word that stands
    in small letters in the question and never in the text is not the name in the text.

    >>> r = Relevance({"lies": 99, "is": 50}, 100, {"where": 9, "is": 9}, 1.0)
    >>> texts = ["Kyiv lies at 50 N.", "Wonder lies at 51 N.", "Kyivka lies at 49 N."]
    >>> asked = ["Where is Kyiv?", "I wonder where Kyjiv is", "on what latitude would kyiv be"]
    >>> r.evidence(asked, [texts, texts, texts]).round(1).tolist()
    [1.0, 0.0, 1.0]

    (The similarity of whole texts does not tell: most of it lies in letters that many names share.)
    """

    FILE = "relevance.json"  # in the directory of the base

    def __init__(self, known, n_texts, asked, least):
        self.known = known  # word -> how many texts have it, if more than one
        self.n_texts = n_texts
        self.asked = asked  # word -> with how many answers it is asked for, if more than one
        self.least = least  # a text for which so much speaks is about the question

    def evidence(self, questions, found):
        """found: for each question the texts that were found. -> (n,), what speaks for the best."""
        out = np.zeros(len(questions))
        for n, (question, texts) in enumerate(zip(questions, found, strict=True)):
            asked = dict.fromkeys(words(question))  # each once, in order: sums come out equal
            small = small_words(question)
            for text in texts:
                there = set(words(text))
                if small:
                    there -= (small & there) - lower_words(text)
                weights = [self.weight(word) for word in asked if word in there]
                out[n] = max(out[n], sum(weights))
        return out

    def weight(self, word):
        """What a word that a text shares with a question is worth."""
        texts = max(self.n_texts, 1)
        rare = math.log((texts + 2) / (self.known.get(word, 1) + 1))
        rarest = math.log((texts + 2) / 2)
        return max(rare, 0.0) / rarest / self.asked.get(word, 1)

    def save(self, folder):
        made = dict(least=self.least, n_texts=self.n_texts, asked=self.asked, known=self.known)
        write_sealed(Path(folder, self.FILE), made)

    @staticmethod
    def open(folder):
        """What `save` wrote; None where nobody has calibrated the base."""
        file = Path(folder, Relevance.FILE)
        if not file.exists():
            return None
        anew = command("kb.py", "calibrate", "--kb", folder)
        cure = f"remove it: every question then finds something, until {anew}"
        made = read_sealed(file, dict(least=float, n_texts=int, asked=dict, known=dict), cure)
        counts = [made["n_texts"] + 1, *made["asked"].values(), *made["known"].values()]
        complete = all(type(n) is int and n > 0 for n in counts)
        check(complete, f"{file} is damaged: {cure}")
        return Relevance(made["known"], made["n_texts"], made["asked"], made["least"])


class Only:
    """Finds only references whose source says key = value, for all of `wanted`, a dict."""

    def __init__(self, live, wanted):
        self.live = live
        self.wanted = wanted

    def __getattr__(self, name):  # all else is as it is
        return getattr(self.live, name)

    def __len__(self):
        return len(self.live)

    def search(self, queries, k):
        """As Retriever.search. It looks at ever more references, until k of them fit or it has
        looked at all that the index compares: in lists, or by keys, these are the nearest alone."""
        most = max(len(self.live), k)
        look = 4 * k
        while True:
            ids, scores = self.live.nearest(queries, min(look, most))  # (n, look)
            valid = self._fits(ids)
            n_fitting = valid.sum(1)  # (n,)
            if look >= most or (n_fitting >= k).all():
                break
            look *= 4
        ids = np.where(valid, ids, -1)
        scores = np.where(valid, scores, NOTHING)
        ids, scores = best_of(ids, scores, k)  # (n, k), or all there are
        lacking = ((0, 0), (0, k - ids.shape[1]))
        ids = np.pad(ids, lacking, constant_values=-1)
        scores = np.pad(scores, lacking, constant_values=NOTHING)
        return self.live.judge(queries, ids, scores)

    def _fits(self, ids):
        """Which of ids (n, k) have a source that says what is wanted."""
        names = np.unique(ids[ids >= 0])
        texts = self.live.references.rows(names)
        valid = [text.id for text in texts if text.says(self.wanted)]
        return np.isin(ids, valid) & (ids >= 0)


# -- Other sources ----------------------------------------------------------------------------


class Random:
    """Recalls k memories at random, whatever the query: the noise baseline.

    ids: the references that there are, or how many from 0 on."""

    def __init__(self, ids, seed=0):
        self.ids = np.arange(ids) if isinstance(ids, int) else ids
        self.rng = np.random.default_rng(seed)

    def search(self, queries, k):
        shape = (len(queries), k)
        n = len(self.ids)
        if n == 0:
            nothing = np.full(shape, -1)
            return nothing, np.full(shape, NOTHING)
        drawn = self.rng.integers(0, n, shape)
        return self.ids[drawn], np.zeros(shape)


class Given:
    """Recalls references ids (B, n), whatever the query: for instance each sequence's right one."""

    def __init__(self, ids):
        self.ids = np.asarray(ids)

    def search(self, queries, k):
        shape = (len(queries), k)
        ids = np.full(shape, -1)
        sequence = np.arange(len(queries)) % len(self.ids)  # queries come chunk by chunk
        given = self.ids[sequence, :k]  # (n, k), or all that are given
        ids[:, : given.shape[1]] = given
        return ids, np.zeros(shape)


class Filtered:
    """A retriever that recalls no copy of its query: a reference that overlaps it by more than the
    threshold, eq. (3.3), is dropped, and the next best takes its place (sec. 4.4)."""

    def __init__(self, retriever, references, threshold=2 / 3, extra=16):
        self.retriever = retriever
        self.references = references
        self.threshold = threshold
        self.extra = extra  # references to search beyond k

    def search(self, queries, k):
        """queries: token lists. As Retriever.search: ids (n, k), -1 = none; scores (n, k)."""
        found, found_scores = self.retriever.search(queries, k + self.extra)
        ids = np.full((len(queries), k), -1)
        scores = np.full((len(queries), k), NOTHING, np.float32)
        for row, query in enumerate(queries):
            kept = []
            for place, i in enumerate(found[row].tolist()):
                if i >= 0 and not exceeds(query, self.references[i], self.threshold):
                    kept.append(place)
                if len(kept) == k:
                    break
            ids[row, : len(kept)] = found[row, kept]
            scores[row, : len(kept)] = found_scores[row, kept]
        return ids, scores


# -- Neighbours for training (sec. 3.6) -------------------------------------------------------

# The .json beside <split>.neighbors.bin: what the neighbours were made from, and for what
NEIGHBORS = dict(
    name=str,
    references=str,
    chunk_len=int,
    context=int,
    threshold=float,
    k=int,
    n_chunks=int,
    n_tokens=int,
    tokens=str,
)


def neighbors(
    tokens,
    chunk_len,
    references,
    retriever,
    k,
    *,
    threshold=0.9,
    context=2048,
    extra=3,
    start=0,
    stop=None,
):
    """For chunks start..stop-1, the k best references that are no copies of the chunk's sequence.

    tokens (n,): a split. Chunk i, tokens [iC, (i+1)C), is the query for k + extra references. Those
    that overlap its train sequence, the aligned window of `context` tokens around it, by more than
    the threshold (eq. 3.3) are dropped: with the answer in memory nothing would be learnt. Their
    titles, where they have any, do not count (corpus.References.body): else a text that is all
    there but for its title would pass.
    Returns (stop - start, k) int32, best first, -1 = none.
    """
    check_grid(chunk_len, context)
    n_chunks = len(tokens) // chunk_len
    stop = n_chunks if stop is None else min(stop, n_chunks)
    chunks = np.asarray(tokens[start * chunk_len : stop * chunk_len])
    chunks = chunks.reshape(-1, chunk_len)  # (stop - start, C)
    ids, _ = retriever.search(chunks, k + extra)  # (stop - start, k + extra)
    out = np.full((len(chunks), k), -1, np.int32)
    copied = {}  # (sequence, reference) -> whether the one holds a copy of the other
    for row, found in enumerate(ids.tolist()):
        # the window of the training that the chunk lies in: all of it is read together
        sequence = (start + row) * chunk_len // context
        window = tokens[sequence * context : (sequence + 1) * context]
        kept = []
        for i in found:  # best first
            if i < 0 or len(kept) == k:
                break
            if (sequence, i) not in copied:  # chunks of one sequence find the same references
                copied[sequence, i] = exceeds(window, references.body(i), threshold)
            if not copied[sequence, i]:
                kept.append(i)
        out[row, : len(kept)] = kept
    return out


def check_grid(chunk_len, context):
    """UserError unless windows of `context` tokens are whole chunks."""
    line = f"--context {context}: give a multiple of chunk_len {chunk_len}"
    check(context >= chunk_len and context % chunk_len == 0, line)


def write_neighbors(
    path,
    tokens,
    chunk_len,
    references,
    retriever,
    k,
    *,
    threshold=0.9,
    context=2048,
    batch=4096,
    progress=True,
    shard=(1, 1),
):
    """Writes `neighbors` of a split: path (int32, (n_chunks, k)) and the same name in .json.

    shard (i, n): only an n-th of the chunks, as one of n processes; whichever finds all shards done
    puts them together. Returns whether the whole file is there. After a kill the same call goes on
    where it stopped, unless what it depends on has changed. KeyboardInterrupt says how far it came.
    """
    path = Path(path)
    check_grid(chunk_len, context)  # first: what is refused leaves the files as they are
    index = retriever.path
    n_chunks = len(tokens) // chunk_len
    cure = cure_for(index, retriever.embedder.name)
    of_these = retriever.meta["references"] == references.hash
    check(of_these, f"{index}: an index of other references; {cure}")
    check(n_chunks, f"{path}: the split has no {chunk_len} tokens: give a smaller --chunk_len")
    meta = dict(
        threshold=float(threshold),
        context=context,
        chunk_len=chunk_len,
        k=k,
        n_chunks=n_chunks,
        n_tokens=len(tokens),
        index=retriever.meta | dict(version=retriever.version),
        tokens=digest(tokens),
        name=Path(references.path).name,
        references=references.hash,
    )
    side = path.with_suffix(".json")
    i, n_shards = shard
    start, stop = share_of(n_chunks, i, n_shards, batch)
    with lock(path.parent):
        if _sidecar(side) != meta:  # the parts, if any, are of something else
            for old in [path, *path.parent.glob(f"{path.name}.*.part")]:
                old.unlink(missing_ok=True)
            write_json(side, meta)  # until the end it describes the parts
        elif _is_whole(path, meta):
            return True
        file = part_of(path, i, n_shards).open("ab")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # one process a shard; a second one waits
        done = os.fstat(file.fileno()).st_size // (4 * k)  # whole rows of int32
        if done < stop - start:
            done = done // batch * batch  # so that every search is the one of an unbroken run
        file.truncate(4 * k * done)
        with tqdm(total=stop - start, initial=done, unit=" chunks", disable=not progress) as bar:
            try:
                while done < stop - start:
                    first = start + done
                    rows = neighbors(
                        tokens,
                        chunk_len,
                        references,
                        retriever,
                        k,
                        threshold=threshold,
                        context=context,
                        start=first,
                        stop=min(first + batch, stop),
                    )
                    file.write(rows)
                    file.flush()
                    bar.update(len(rows))
                    done += len(rows)
            except KeyboardInterrupt:
                kept = f"after {done:,} of {stop - start:,} chunks, which are kept"
                raise KeyboardInterrupt(f"{kept}: the same command goes on") from None
    with lock(path.parent):
        line = f"{path}: another process has begun others, with other flags: give this command anew"
        check(_sidecar(side) == meta, line)
        return _join_neighbors(path, meta, n_shards, batch)


def part_of(path, i, n_shards):
    """The file with the rows of shard i of n."""
    return Path(f"{path}.{i}-of-{n_shards}.part")


def _is_whole(path, meta):
    return path.exists() and path.stat().st_size == 4 * meta["k"] * meta["n_chunks"]


def _join_neighbors(path, meta, n_shards, batch):
    """Puts all shards together, if they are done. The caller holds the lock of the directory."""
    if _is_whole(path, meta):
        return True
    parts = []
    for i in range(1, n_shards + 1):
        start, stop = share_of(meta["n_chunks"], i, n_shards, batch)
        part = part_of(path, i, n_shards)
        if not part.exists() or part.stat().st_size != 4 * meta["k"] * (stop - start):
            return False
        parts.append(part)

    def write(file):
        for part in parts:
            with part.open("rb") as rows:
                shutil.copyfileobj(rows, file)

    replace_file(path, write)
    for old in path.parent.glob(f"{path.name}.*.part"):
        old.unlink()
    return True


def _sidecar(side):
    """The .json of unfinished neighbours; None if there is none to go on with."""
    try:
        return read_json(side, NEIGHBORS, "")
    except UserError:
        return None


def open_neighbors(data, split, chunk_len=None, context=None):
    """The neighbours of a split in a data directory: (n_chunks, k) int32, and its references' name.

    chunk_len, context: those of the training that will use them. UserError if they were made for
    another split, other references or another chunk_len, or if the windows of the training do not
    lie within those that the filter looked at.
    """
    path = Path(f"{data}/{split}.neighbors.bin")
    side = path.with_suffix(".json")
    requested = dict(references=_references_for(data, split))
    requested["chunk_len"] = chunk_len or 64
    requested["context"] = context or 2048
    cure = _neighbors_cure(data, split, requested)
    check(side.exists() and path.exists(), f"{path}: no neighbours here; {cure}")
    meta = read_json(side, NEIGHBORS, cure)
    k = meta["k"]
    n_chunks = meta["n_chunks"]
    for name in ("chunk_len", "context", "k", "n_chunks"):
        check(meta[name] >= 1, f"{side} is damaged: {name} {meta[name]}; {cure}")

    # what was not asked for stays as it was: the cure says all of it
    requested["references"] = meta["name"]
    requested["chunk_len"] = chunk_len or meta["chunk_len"]
    requested["context"] = context or meta["context"]
    requested["k"] = k
    requested["threshold"] = meta["threshold"]
    cure = _neighbors_cure(data, split, requested)
    tokens = corpus.open_tokens(data, split)
    references = corpus.References.open(f"{data}/{meta['name']}")
    current = dict(chunk_len=requested["chunk_len"], references=references.hash)
    current |= dict(n_tokens=len(tokens), tokens=digest(tokens))
    for key, value in current.items():
        check(meta[key] == value, f"{path} is for {key} {meta[key]}, not {value}; {cure}")

    # a window of the training must lie within one window of the filter
    context = requested["context"]
    line = f"{path}: copies were filtered from windows of {meta['context']} tokens"
    check(meta["context"] % context == 0, f"{line}, not of {context}; {cure}")
    check(path.stat().st_size == 4 * n_chunks * k, f"{path} is cut off; {cure}")
    rows = np.memmap(path, np.int32, "r", shape=(n_chunks, k))
    return rows, meta["name"]


def _references_for(data, split):
    """The name of the references in a data directory that suit a split best."""
    there = sorted(file.stem for file in Path(data).glob("*.idx"))
    # training must not recall from the knowledge base that the model is tested with
    order = ("train_refs", "kb") if split == "explicit" else ("kb", "train_refs")
    for name in (*order, *there):
        if name in there:
            return name
    return "kb"


def _neighbors_cure(data, split, flags):
    words = ["--data", data, "--split", split]
    for name, value in flags.items():
        words += [f"--{name}", value]
    return f"make them with: {command('retrieval.py', 'neighbors', *words)}"


# -- The command line -------------------------------------------------------------------------


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=main.__doc__, **form)
    commands = p.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="embed references, so that they are found", **form)
    join_ = commands.add_parser("join", help="make the index of its finished shards", **form)
    near = commands.add_parser("neighbors", help="references for every training chunk", **form)
    for part in (index, join_, near):
        part.add_argument("--data", required=True, help="prepared data directory: data/cities")
        part.add_argument("--references", default="kb", help="its references: kb, train_refs")
    embedder_help = f"{KINDS} (Remark 3.1)"
    index.add_argument("--embedder", default="hash", help=embedder_help)
    for part in (index, near):
        checkpoint_help = "the model whose keys are the vectors, for --embedder self:LAYER.HEAD"
        part.add_argument("--checkpoint", default="checkpoints/toy", help=checkpoint_help)
    index.add_argument("--factory", help="FAISS factory string (None: chosen by size)")
    for part in (index, near):
        shard_help = "i/n: only this share, as one of n processes that write all"
        part.add_argument("--shard", type=shard, metavar="i/n", help=shard_help)
        n_help = f"at once (0: of the hashed embedder from {MANY:,} texts on, one for each thread)"
        part.add_argument("--processes", type=number(int, 0), default=0, help=n_help)
        part.add_argument("--quiet", action="store_true", help="print nothing but errors")
    for part in (index, join_):
        on_disk = "lists in a file of their own: the whole index is never in RAM"
        part.add_argument("--on_disk", action="store_true", help=on_disk)
    near.add_argument("--split", default="explicit", help="token file whose chunks are the queries")
    near.add_argument("--chunk_len", type=number(int, 1), default=64, help="C, tokens a chunk")
    near.add_argument("--k", type=number(int, 1), default=1, help="references a chunk (paper: 1)")
    near.add_argument(
        "--threshold", type=number(float, 0, 1), default=0.9, help="largest overlap, eq. (3.3)"
    )
    near.add_argument(
        "--context", type=number(int, 1), default=2048, help="tokens of a train sequence"
    )
    return p


def main(argv=None):
    """index writes <data>/<references>.index/, or with --shard a part of it; join puts the parts
    together; neighbors writes <data>/<split>.neighbors.bin and .json (and the index, with default
    options, if there is none); of its shards the last one puts all together. If one is stopped, the
    same command goes on where it was. torchrun's processes take a shard each."""
    argv = sys.argv[1:] if argv is None else argv
    a = parser().parse_args(argv)
    path = f"{a.data}/{a.references}.index"
    references = corpus.References.open(f"{a.data}/{a.references}")
    if a.command == "join":
        join(path, references, on_disk=a.on_disk)
        report(path, Retriever.open(path, references=references))
        return
    if a.shard:
        check(a.processes <= 1, "--processes: not with --shard, which is for one process")
        a.processes = 1
    ranks = torchrun_share()
    if ranks and a.shard is None:
        a.shard = ranks
        a.quiet = a.quiet or ranks[0] > 1
    if a.command == "index":
        write_index(path, references, a, argv, ranks)
    else:
        find_neighbors(path, references, a, argv, ranks)


def wait_for_all():
    """Returns once all processes of torchrun have come here."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    dist.barrier()


def n_processes(a, n, encoder):
    """How many processes share n texts: as --processes says, or as PyTorch would take threads."""
    if a.processes or a.shard:
        return a.processes or 1
    return torch.get_num_threads() if n >= MANY and encoder.startswith("hash") else 1


def in_processes(argv, n, files, size, total, what):
    """Gives the same command to n processes, a shard each, and shows how far they are.

    files: lists the files that they write; size: bytes of one of `total`. If one of them fails,
    which it says itself, so does this process.
    """
    env = os.environ | dict(OMP_NUM_THREADS="1")
    words = [sys.executable, str(Path(__file__).resolve()), *map(str, argv), "--quiet"]
    started = []
    try:
        for i in range(1, n + 1):
            # in a session of its own: Ctrl-C reaches this process alone, which ends them
            share = [*words, "--processes", "1", "--shard", f"{i}/{n}"]
            started.append(subprocess.Popen(share, env=env, start_new_session=True))
        with tqdm(total=total, desc=what) as bar:
            while True:
                codes = [process.poll() for process in started]
                done = sum(bytes_of(file) for file in files()) // size
                bar.update(max(0, done - bar.n))
                if None not in codes or any(codes):
                    break
                time.sleep(0.2)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what is done is kept: the same command goes on") from None
    finally:
        for process in started:
            process.terminate()  # nothing, where it has ended
            process.wait()
    if any(codes):
        sys.exit(f"retrieval.py: a process of {n} has failed, see above; the others are stopped")


def bytes_of(file):
    """Of a file that another process may remove meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def write_index(path, references, a, argv, ranks):
    """The command `index`. ranks: the share of torchrun's process, or None."""
    if a.embedder.startswith("self:"):
        alone = a.factory is None and a.shard is None and a.processes <= 1 and not a.on_disk
        flags = "--factory, --shard, --processes, --on_disk"
        check(alone, f"{flags}: not with --embedder self:")
        model, _ = load_checkpoint(a.checkpoint)
        report(path, inside.KeyRetriever.build(path, references, a.data, a.embedder, model.eval()))
        return
    make_index(path, references, a, argv, ranks, a.embedder, a.factory, a.on_disk)
    if a.shard and not ranks:
        if not a.quiet:
            flags = ["--data", a.data, "--references", a.references]
            if a.on_disk:
                flags.append("--on_disk")
            i, n = a.shard
            print(f"{path}: shard {i} of {n} is done; with all of them there, run")
            print(command("retrieval.py", "join", *flags))
    elif not a.quiet:
        report(path, Retriever.open(path, references=references))


def make_index(path, references, a, argv, ranks, encoder="hash", factory=None, on_disk=False):
    """The index, by one process, several, or torchrun's; or one shard of it."""
    how = references, a.data, encoder, factory
    n = n_processes(a, len(references), encoder)
    if a.shard or n == 1:
        encode_shard(path, *how, a.shard or (1, 1), not a.quiet)
    else:
        size = prepare(path, *how, n, not a.quiet)
        parts = Path(path, "parts")

        def codes():
            return parts.glob(f"*-of-{n}.codes")

        in_processes(argv, n, codes, size, len(references), "embedding")
    if ranks:
        wait_for_all()  # no shard begins after the first process has joined them
        if ranks[0] == 1:
            join(path, references, True, on_disk)
        wait_for_all()
    elif not a.shard:
        join(path, references, not a.quiet, on_disk)


def find_neighbors(path, references, a, argv, ranks):
    """The command `neighbors`. ranks: the share of torchrun's process, or None."""
    if not is_index(path):
        line = f"{path}: there is no index yet, which all shards need; {cure_for(path, 'hash')}"
        check(ranks or not a.shard, line)
        command_line = ["index", "--data", a.data, "--references", a.references]
        if a.processes:
            command_line += ["--processes", a.processes]
        make_index(path, references, a, command_line, ranks)
    tokens = corpus.open_tokens(a.data, a.split)
    out = Path(f"{a.data}/{a.split}.neighbors.bin")
    model = None
    made_of = read_json(Path(path, "meta.json"), dict(embedder=str), cure_for(path))["embedder"]
    if made_of.startswith("self:"):
        model = load_checkpoint(a.checkpoint)[0].eval()
    n_chunks = len(tokens) // a.chunk_len
    n = n_processes(a, n_chunks, made_of)
    if n > 1:

        def rows():
            return [part_of(out, i, n) for i in range(1, n + 1)]

        in_processes(argv, n, rows, 4 * a.k, n_chunks, "searching")
    else:
        retriever = Retriever.open(path, None, references, model)
        how = dict(threshold=a.threshold, context=a.context, progress=not a.quiet)
        how["shard"] = a.shard or (1, 1)
        write_neighbors(out, tokens, a.chunk_len, references, retriever, a.k, **how)
    if ranks:
        wait_for_all()
    if a.quiet:
        return
    if not out.exists():
        print(f"{out}: shard {a.shard[0]} of {a.shard[1]} is done; the last one joins them all")
        return
    rows, _ = open_neighbors(a.data, a.split)
    empty = (np.asarray(rows) < 0).mean()
    print(f"{out}: {len(rows):,} chunks x {a.k}, {empty:.2%} empty")


def report(path, retriever):
    """Says what an index is, now that it is there."""
    factory = retriever.meta.get("factory", "keys of its memories")
    print(f"{path}: {len(retriever):,} references, {retriever.embedder.id}, {factory}")


if __name__ == "__main__":
    run(main)
