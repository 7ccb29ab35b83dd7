"""Retrieval: which reference a chunk should recall (sec. 3.1) and which it must not see (sec. 3.6).

overlap      eq. (3.3): how much of a reference a train sequence already contains
embedder     text -> unit vector; one and the same object embeds references and queries
Retriever    a FAISS index of references with its embedder, in one directory
neighbors    the best references of every training chunk that are no copies of it

Whatever has .search(queries, k) -> ids (n, k), scores (n, k) is a source of memories. An id of -1
means that nothing was found; such a place recalls no memory.
"""

import argparse
import fcntl
import hashlib
import json
import re
import shlex
import shutil
import time
import unicodedata
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import corpus
from common import UserError, check, optional, read_array, read_json, replace_file, run, write_json

# -- How much of a reference stands in a text: eq. (3.3) ----------------------------------------


def common_subsequence(t, r):
    """The length of the longest common subsequence of t and r, by its plain recurrence.

        L[i, j] = L[i-1, j-1] + 1                   if t_i = r_j
                  max(L[i-1, j], L[i, j-1])         else

    `overlap` computes the same with fewer operations; the tests compare the two.
    >>> common_subsequence([9, 1, 0, 2, 3], [1, 2, 3])
    3
    """
    row = [0] * (len(r) + 1)  # row[j]: between what was read of t and the first j tokens of r
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
    """overlap(t, r) > threshold (paper: 0.9 in training, sec. 3.6; 2/3 in evaluation, sec. 4.4),
    found without the exact overlap where less will do."""
    t = np.asarray(t).tolist()
    r = np.asarray(r).tolist()
    check(r, "overlap with an empty reference: eq. (3.3) divides by its length")
    above = [n for n in range(len(r) + 1) if n / len(r) > threshold]
    if not above:
        return False
    enough = above[0]
    shared = Counter(t) & Counter(r)
    if shared.total() < enough:  # an upper bound: the tokens they share in any order
        return False
    return _best_window(t, r, floor=enough - 1, enough=enough) >= enough


def _best_window(t, r, floor, enough):
    """The N of eq. (3.3); `floor` where N is no larger; any N from `enough` on where it is there.

    Within a row of the table of `common_subsequence` numbers rise by 0 or 1 from column to column,
    so |r| bits say all of a row: bit j is 0 where it rises at r_j. A new token moves each rise to
    the first match since the rise before it, and one addition does that for the whole row: its
    carry starts at a match, runs through the ones and stops at the rise. So a token costs three
    operations on |r|-bit integers (Crochemore et al. 2001) instead of |r| comparisons.
    """
    n = len(r)
    width = 2 * n + 1
    full = (1 << n) - 1
    places = {}  # token -> the bits of where it stands in r
    for j, token in enumerate(r):
        places[token] = places.get(token, 0) | 1 << j
    match = [places.get(token, 0) for token in t]
    best = floor
    start = 0
    while start <= max(0, len(t) - width) and best < enough:
        flat = full
        for hits in match[start : start + width]:
            moved = flat & hits
            flat = (flat + moved) | (flat - moved)  # what is carried beyond bit n never comes back
        length = n - (flat & full).bit_count()
        # A window moved by one token changes its N by at most one: x short of the best, the next
        # x windows cannot be better.
        start += 1 + max(0, best - length)
        best = max(best, length)
    return best


# -- Words ------------------------------------------------------------------------------------

# Scripts written without spaces between words: letters, and the marks that belong to them.
UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ebd\u0ec0-\u0ece\u0edc-\u0edf"  # Lao
    "\u1000-\u103f\u1050-\u108f\ua9e0-\ua9ef\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17d3\u17dc\u17dd"  # Khmer
    "\u1950-\u1974\u1980-\u19c9\u1a20-\u1a7f"  # Tai Le, New Tai Lue, Tai Tham
    "\u3005-\u3007\u3021-\u302f\u3031-\u3035\u3038-\u303c"  # iteration marks, zero, numerals
    "\u3041-\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
    "\u3105-\u312f\u31a0-\u31bf\ua000-\ua48c"  # Bopomofo, Yi
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
# What may stand inside a word unseen: soft hyphen, joiners, directions, variation selectors
INVISIBLE = re.compile(
    "[\u00ad\u200c-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)
MARK = "".join(chr(c) for c in range(0x20000) if unicodedata.category(chr(c)).startswith("M"))
LETTERS = rf"[^\W{UNSPACED}]"  # and digits: \w of the scripts with spaces
# To \w a combining mark is no part of a word; by Unicode's rules it belongs to its letter.
WORD = re.compile(rf"{LETTERS}+(?:[{MARK}]+{LETTERS}*)*")
ASCII_WORD = re.compile(r"\w+")
RUN = re.compile(rf"[{UNSPACED}]+")
LETTER = re.compile(rf".[{MARK}]*")  # with its marks


def normalize(text):
    """The one form of all canonically equal texts (Unicode's NFC): o + two dots becomes one letter.

    Whatever enters as text passes through here, so that it finds what was written in another form.
    """
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", text)


def words(text):
    """The words of a text, in lower case and in one Unicode form.

    Where a script has no spaces, each letter and each two and three letters in a row are a word.
    >>> words("Kyiv's MU\u0308NCHEN, 名古屋")
    ['kyiv', 's', 'münchen', '名', '古', '屋', '名古', '古屋', '名古屋']
    """
    if text.isascii():
        return ASCII_WORD.findall(text.casefold())
    # Unicode's caseless match: fold the case of the decomposed text, then compose
    text = unicodedata.normalize("NFD", text).casefold()
    text = INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    found = WORD.findall(text)
    for run_of_letters in RUN.findall(text):
        letters = LETTER.findall(run_of_letters)
        for n in (1, 2, 3):
            for i in range(len(letters) - n + 1):
                found.append("".join(letters[i : i + n]))
    return found


# -- Embedders --------------------------------------------------------------------------------
#
# .encode(n texts) -> (n, dim) float32, each of length 1, or 0 where there is nothing to embed
# .fit(texts) -> an embedder that knows these texts; .state: what it has learnt, as one array
# .name: what --embedder was; .id: names the vectors exactly: equal ids, equal vectors


def digest(array):
    """16 hex digits that name the bytes of an array."""
    return hashlib.blake2b(np.ascontiguousarray(array)).hexdigest()[:16]


class HashEmbedder:
    """Hashed tf-idf of words and of their character 3- and 4-grams: no download, no training.

    A word is the signed, idf-weighted sum of its features ("<kyiv>", "<ky", "kyi", ..., "yiv>"),
    a text the normalised sum of its words; without any word it is zero. The same on every machine:
    CRC-32, not Python's salted hash, and an id made of integer counts, not of their logarithms.
    """

    VERSION = 2  # of what a text becomes: it is part of the id
    BUCKETS = 1 << 18  # features are counted in so many
    MOST = 1 << 13  # dimensions that a feature's hash can tell apart
    CACHE = 1 << 16  # words whose vectors are kept: 128 MB at 512 dimensions
    BATCH = 1024  # texts that are embedded at a time

    def __init__(self, dim=512, state=None):
        if state is None:
            state = np.zeros(self.BUCKETS + 1, "<u4")
        self.dim = dim
        self.name = f"hash:{dim}"
        # texts with feature 0, 1, ..., BUCKETS - 1, and the number of texts: all it learns
        self.state = state
        self.id = f"{self.name}:{self.VERSION}:{digest(state)[:12]}"
        self.idf = np.log((state[-1] + 2.0) / (state[:-1] + 1.0))
        self.known = {}  # word -> its vector

    def fit(self, texts):
        """Another one, with document frequencies: how many of the texts have each feature."""
        n = 0
        frequency = np.zeros(self.BUCKETS)
        counts = Counter()
        for text in texts:
            n += 1
            counts.update(set(words(text)))
            if len(counts) > 2 * self.CACHE:  # memory stays flat
                frequency += self._frequency(counts)
                counts.clear()
        frequency += self._frequency(counts)
        frequency = np.minimum(frequency, n)  # a text may have two words of one feature
        return HashEmbedder(self.dim, np.append(frequency, n).astype("<u4"))

    def _frequency(self, counts):
        hashes, n_features = self._hashes(counts)
        weights = np.repeat(list(counts.values()), n_features)
        return np.bincount(hashes % self.BUCKETS, weights, self.BUCKETS)

    @staticmethod
    def _hashes(some_words):
        """The features of words as 32-bit hashes: those of all words in a row, and how many each
        word has. Bits 0-17 name the feature, 18-30 its dimension, 31 its sign."""
        hashes = []
        n_features = []
        for word in some_words:
            before = len(hashes)
            if RUN.match(word):
                hashes.append(zlib.crc32(word.encode()))
            else:
                marked = f"<{word}>"
                if marked.isascii():
                    marked = marked.encode()  # slices of bytes are hashed as they are
                _hash_grams(marked, hashes)
            n_features.append(len(hashes) - before)
        return np.array(hashes, np.int64), np.array(n_features, np.int64)

    def _vectors(self, some_words):
        """(n, dim) float32: the vector of each word."""
        hashes, n_features = self._hashes(some_words)
        sign = np.where(hashes >> 31, -1, 1)
        values = self.idf[hashes % self.BUCKETS] * sign
        dimension = (hashes >> 18) % self.MOST % self.dim
        row = np.repeat(np.arange(len(n_features)), n_features)
        flat = np.bincount(row * self.dim + dimension, values, len(n_features) * self.dim)
        return flat.astype(np.float32).reshape(-1, self.dim)

    def encode(self, texts):
        texts = list(texts)
        out = np.zeros((len(texts), self.dim), np.float32)
        for i in range(0, len(texts), self.BATCH):
            out[i : i + self.BATCH] = self._encode(texts[i : i + self.BATCH])
        return out

    def _encode(self, texts):
        bags = [words(text) for text in texts]
        vocabulary = dict.fromkeys(chain.from_iterable(bags))  # each word once, in order
        new = [word for word in vocabulary if word not in self.known]
        if len(self.known) + len(new) > self.CACHE:
            self.known.clear()  # the common words come back at once
            new = list(vocabulary)
        if new:
            self.known.update(zip(new, self._vectors(new), strict=True))
        table = np.zeros((len(vocabulary), self.dim), np.float32)
        row = {}
        for i, word in enumerate(vocabulary):
            table[i] = self.known[word]
            row[word] = i
        flat = [row[word] for bag in bags for word in bag]
        starts = np.cumsum([0] + [len(bag) for bag in bags])[:-1]  # of each bag in flat
        if not flat:
            return np.zeros((len(texts), self.dim), np.float32)
        out = F.embedding_bag(
            torch.tensor(flat), torch.from_numpy(table), torch.from_numpy(starts), mode="sum"
        )  # (n, dim): the words of a text are added up in their order
        out = out.numpy()
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)


def _hash_grams(marked, hashes):
    """Appends the hashes of "<word>" and of its 3- and 4-grams. marked: text, or ASCII bytes."""
    if isinstance(marked, bytes):
        hashes.append(zlib.crc32(b"=" + marked))
        for n in (3, 4):
            for i in range(len(marked) - n + 1):
                hashes.append(zlib.crc32(marked[i : i + n]))
        return
    hashes.append(zlib.crc32(("=" + marked).encode("utf-8", "replace")))
    for n in (3, 4):
        for i in range(len(marked) - n + 1):
            hashes.append(zlib.crc32(marked[i : i + n].encode("utf-8", "replace")))


class HuggingFaceEmbedder:
    """Any Hugging Face encoder: the normalised output feature of its first token, <cls> (3.1)."""

    def __init__(self, name):
        transformers = optional("transformers")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.model = transformers.AutoModel.from_pretrained(name).eval().to(device)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(f"--embedder hf:{name} cannot be loaded: {why}") from None
        self.dim = self.model.config.hidden_size
        self.state = np.zeros(0, "<u4")
        self.name = f"hf:{name}"
        self.id = f"{self.name}:{self.dim}:{self._weights()}"

    def _weights(self):
        """A hash of weights and vocabulary: the files under a name may be replaced by others."""
        digest = hashlib.blake2b()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        config = self.model.config.to_diff_dict()
        config.pop("_name_or_path", None)  # the path is in the name
        config.pop("transformers_version", None)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        if self.tokenizer.is_fast:
            digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        else:
            digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        return digest.hexdigest()[:12]

    def fit(self, texts):
        return self

    @torch.inference_mode()
    def encode(self, texts):
        texts = [normalize(text) for text in texts]
        out = torch.zeros(len(texts), self.dim)
        for i in range(0, len(texts), 64):
            some = texts[i : i + 64]
            batch = self.tokenizer(some, return_tensors="pt", padding=True, truncation=True)
            features = self.model(**batch.to(self.model.device)).last_hidden_state  # (n, m, dim)
            out[i : i + 64] = features[:, 0]
        return F.normalize(out, dim=-1).numpy()


def embedder(name, state=None):
    """The embedder called "hash", "hash:DIM", "hf:NAME" or "bge-m3" (the paper's), or UserError.

    state: the .state of the same embedder after .fit, from disk. An object is returned as it is.
    """
    if not isinstance(name, str):
        return name
    full = {"hash": "hash:512", "bge-m3": "hf:BAAI/bge-m3"}.get(name, name)
    if full.startswith("hf:") and len(full) > 3:
        return HuggingFaceEmbedder(full[3:])
    match = re.fullmatch(r"hash:([1-9][0-9]{0,5})", full)
    check(match, f"unknown embedder {name!r}: take hash, hash:DIM, bge-m3 or hf:NAME")
    dim = int(match[1])
    check(dim <= HashEmbedder.MOST, f"embedder {name}: at most {HashEmbedder.MOST} dimensions")
    return HashEmbedder(dim, state)


# -- The index --------------------------------------------------------------------------------

FORMAT = "memory3 index 2"
NOTHING = -1.0  # the score where nothing was found: no cosine is below
FLAT = 100_000  # references: up to so many every vector is compared, exactly
SCALAR = 10_000_000  # references: up to so many a byte a dimension is kept, beyond it a quarter
PROBES = 32  # lists of an inverted file that a query looks into
# What vouches for an index; its files are in its own directory, its tokenizer in the one above.
META = dict(
    format=str,
    n=int,
    dim=int,
    embedder=str,
    embedder_id=str,
    factory=str,
    tokenizer=str,
    tokenizer_id=str,
    references=str,
    checksum=int,
    blank=list,
    least=float,
)


def choose_factory(n, dim=512):
    """The FAISS factory string for n vectors of `dim` numbers.

    Exact up to FLAT. Beyond, about 4 sqrt(n) lists, found through an HNSW graph; their vectors are
    kept as a byte a number (SQ8), or from SCALAR on as product codes of 4 numbers a byte.
    >>> choose_factory(20_000), choose_factory(1_000_000), choose_factory(112_000_000)
    ('Flat', 'IVF4096_HNSW32,SQ8', 'IVF32768_HNSW32,PQ128')
    """
    if n <= FLAT:
        return "Flat"
    lists = 1 << round(np.log2(4 * n**0.5))
    if n <= SCALAR or dim % 4:
        return f"IVF{lists}_HNSW32,SQ8"
    return f"IVF{lists}_HNSW32,PQ{dim // 4}"


def _cure(path, name=None):
    """What makes an index that is missing or wrong, as a command with its flags."""
    path = Path(path)
    flags = ["--data", str(path.parent), "--references", path.stem]
    if name:
        flags += ["--embedder", name]
    return f"make it anew with: python retrieval.py index {shlex.join(flags)}"


class Retriever:
    """References that are found by text: the id of a reference is its row.

        index.faiss     the vectors of references 0..n-1, as they were when the index was made
        embedder.npy    what the embedder has learnt of them
        meta.json       what index, embedder, tokenizer and references belong together
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
        # A hit is what scores above this: 0, nothing in common, until `calibrate` knows better
        self.least = meta.get("least", 0.0)
        self.fresh = None  # a faiss.IndexIDMap2 of the vectors that are new, once there are any
        self.blank = set(meta.get("blank", ()))  # ids whose text has no vector: never found
        self.hidden = set(self.blank)  # rows of the index that are no longer to be found
        self.version = 0  # of changes.npz

    def __len__(self):
        fresh = self.fresh.ntotal if self.fresh else 0
        return self.index.ntotal - len(self.hidden) + len(self.blank) + fresh

    @staticmethod
    def build(path, references, tokenizer_name, encoder="hash", factory=None, progress=True):
        """Indexes a corpus.References (id = row) and writes the directory `path`. Stopped at any
        moment and called again, it goes on where it was.

        encoder: an embedder or its name. factory: a FAISS factory string instead of our choice.
        """
        model = encode_shard(path, references, tokenizer_name, encoder, factory, progress=progress)
        return join(path, references, model, progress)

    @staticmethod
    def open(path, encoder=None, references=None):
        """Opens an index. encoder: an embedder or its name, instead of that of the index.
        references: those that the ids are to name. UserError without an index, or if its parts, or
        it and the references, do not belong together."""
        path = Path(path)
        cure = _cure(path)
        check((path / "meta.json").exists(), f"{path}: no index here; {cure}")
        meta = read_json(path / "meta.json", META, cure)
        check(meta["format"] == FORMAT, f"{path} is a {meta['format']}, not {FORMAT}; {cure}")
        cure = _cure(path, meta["embedder"])
        state = read_array(path / "embedder.npy", "<u4", (None,), cure)
        model = _embedder_of(encoder or meta["embedder"], state, path, cure)
        tokenizer = corpus.tokenizer(_tokenizer_name(path, meta["tokenizer"]))
        _same(path, "embedder", meta["embedder_id"], model.id, cure)
        _same(path, "tokenizer", meta["tokenizer_id"], tokenizer.id, cure)
        index = _read_index(path / "index.faiss", meta, cure)
        retriever = Retriever(path, index, model, tokenizer, meta)
        retriever._read_changes(cure)
        fits = references is None or references.hash == meta["references"]
        check(fits, f"{path} is stale: its references have changed since; {cure}")
        return retriever

    def search(self, queries, k):
        """The k references most similar to each query (cosine, sec. 3.1), best first.

        queries: n texts, or n token sequences: lists, or integers (n, m) with -1 = padding.
        Returns ids (n, k) int64 and scores (n, k) float32. What scores no more than `least`, by
        default 0, is not found: its id is -1, its score -1. So a query without any word finds
        nothing, and one may ask for more references than there are.
        """
        check(k >= 1, f"{self.path}: {k} references asked for; ask for 1 or more")
        check(not isinstance(queries, str), "search takes a list of texts, not one text")
        vectors = self._embed(self._texts(queries))  # (n, dim)
        finite = np.isfinite(vectors).all(1)
        vectors[~finite] = 0
        ids, scores = self._search_rows(vectors, k)
        if self.fresh is not None and self.fresh.ntotal:
            found, cosines = _search(self.fresh, vectors, k)
            ids = np.concatenate([ids, found], 1)  # (n, 2k)
            scores = np.concatenate([scores, cosines], 1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            ids = np.take_along_axis(ids, best, 1)
            scores = np.take_along_axis(scores, best, 1)
        nothing = ~(scores > self.least)
        ids[nothing] = -1
        scores[nothing] = NOTHING
        return ids, scores

    def _texts(self, queries):
        if hasattr(queries, "tolist"):
            queries = queries.tolist()
        texts = []
        for query in queries:
            if not isinstance(query, str):
                query = self.tokenizer.decode(query)
            texts.append(normalize(query))
        return texts

    def _embed(self, texts):
        vectors = np.array(self.embedder.encode(texts), np.float32)
        fits = vectors.shape == (len(texts), self.embedder.dim)
        check(fits, f"embedder {self.embedder.name} gives {vectors.shape} for {len(texts)} texts")
        return vectors

    def _search_rows(self, vectors, k):
        """The k best rows of the index that are not hidden; NOTHING where there are no more."""
        hidden = np.fromiter(self.hidden, np.int64, len(self.hidden))
        most = k
        while True:
            ids, scores = _search(self.index, vectors, most)
            out = np.isin(ids, hidden)
            found = ((ids >= 0) & ~out).sum(1)
            exhausted = (ids < 0).any(1) | (most >= self.index.ntotal)
            if not out.any() or (exhausted | (found >= k)).all():
                break
            most = 4 * most  # hidden rows stood in the way
        scores[out] = -np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(ids, best, 1), np.take_along_axis(scores, best, 1)

    def _has(self, i):
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
        """Like remove and replace: searches know it at once, the disk only after save()."""
        ids = [int(i) for i in ids]
        texts = [normalize(text) for text in texts]
        there = [i for i in ids if self._has(i)]
        check(not there, f"{self.path}: add: references {there} are there already; replace them")
        check(len(set(ids)) == len(ids) == len(texts), f"add: one text for each id, once: {ids}")
        check(all(i >= 0 for i in ids), f"add: ids are at least 0: {ids}")
        if not ids:
            return
        vectors = self._embed(texts)
        check(np.isfinite(vectors).all(), f"embedder {self.embedder.name} gives NaN for a text")
        full = vectors.any(1)
        ids = np.array(ids, np.int64)
        self.blank.update(ids[~full].tolist())
        if self.fresh is None:
            self.fresh = _exact_index(self.embedder.dim)
        self.fresh.add_with_ids(vectors[full], ids[full])

    def remove(self, ids):
        """Forgets references: no search finds them. Their old vectors stay in index.faiss, hidden,
        until the index is made anew."""
        ids = [int(i) for i in ids]
        unknown = [i for i in ids if not self._has(i)]
        check(not unknown, f"{self.path} has no references {unknown} to remove or replace")
        fresh = [i for i in ids if self._is_fresh(i)]
        if fresh:
            self.fresh.remove_ids(np.array(fresh, np.int64))
        for i in ids:
            self.blank.discard(i)
            if i < self.index.ntotal:
                self.hidden.add(i)

    def replace(self, ids, texts):
        check(len(ids) == len(texts), f"replace: one text for each id: {list(ids)}")
        self.remove(ids)
        self.add(ids, texts)

    def save(self, references=None):
        """Writes the changes, not the index: O(changes). references: what they made of the
        references. UserError if another process has saved changes since this index was opened."""
        if references is not None:
            self.meta["references"] = references.hash
        if self.fresh is None:
            self.fresh = _exact_index(self.embedder.dim)
        faiss = optional("faiss")
        n = self.fresh.ntotal
        vectors = faiss.downcast_index(self.fresh.index).reconstruct_n(0, n)
        arrays = dict(
            base=np.array(self.meta["checksum"], np.int64),
            version=np.array(self.version + 1, np.int64),
            references=np.array(self.meta["references"]),
            hidden=np.array(sorted(self.hidden), np.int64),
            blank=np.array(sorted(self.blank), np.int64),
            ids=faiss.vector_to_array(self.fresh.id_map),
            vectors=vectors.reshape(n, self.embedder.dim),
        )
        with _lock(self.path):
            on_disk = self._changes(_cure(self.path, self.embedder.name))
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
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in kinds}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}); {cure}") from None
        fits = all(arrays[name].dtype.kind == kind for name, kind in kinds.items())
        fits = fits and arrays["vectors"].shape == (len(arrays["ids"]), self.embedder.dim)
        check(fits, f"{path} is damaged; {cure}")
        if int(arrays["base"]) != self.meta["checksum"]:
            return None  # they are changes of an index that has been made anew since
        return arrays

    def _read_changes(self, cure):
        arrays = self._changes(cure)
        if arrays is None:
            return
        self.version = int(arrays["version"])
        self.meta["references"] = str(arrays["references"])
        self.hidden = set(arrays["hidden"].tolist())
        self.blank = set(arrays["blank"].tolist())
        self.fresh = _exact_index(self.embedder.dim)
        self.fresh.add_with_ids(arrays["vectors"].astype(np.float32), arrays["ids"])

    def calibrate(self, answerable, unanswerable, keep=0.95):
        """Sets `least`, the score above which a hit counts, from queries whose reference is here
        and queries whose reference is not, so that `keep` of the former still find something; it is
        stored in meta.json. Returns least, and the share of the latter that then find nothing."""
        check(len(answerable) and len(unanswerable), "calibrate: give queries of both kinds")
        check(0 < keep <= 1, f"calibrate: keep {keep}; give a share above 0, at most 1")
        self.least = 0.0
        good = np.sort(self.search(answerable, 1)[1][:, 0])
        bad = self.search(unanswerable, 1)[1][:, 0]
        lost = int((1 - keep) * len(good))  # so many of them may find nothing
        self.least = max(0.0, float(np.nextafter(good[lost], np.float32(-np.inf))))
        path = Path(self.path, "meta.json")
        stored = read_json(path, META, _cure(self.path, self.embedder.name))
        self.meta["least"] = self.least
        write_json(path, stored | dict(least=self.least))
        return self.least, float((bad <= self.least).mean())


def _search(index, vectors, k):
    """index.search with ids first, k of any size, and -inf where there is nothing."""
    faiss = optional("faiss")
    n = len(vectors)
    ids = np.full((n, k), -1, np.int64)
    scores = np.full((n, k), -np.inf, np.float32)
    most = min(k, index.ntotal)
    if n and most:
        # From so many queries x dim on FAISS takes BLAS (default: 128,000); from 4 queries it pays
        faiss.cvar.distance_compute_blas_threshold = 4 * vectors.shape[1]
        scores[:, :most], ids[:, :most] = index.search(vectors, most)
    scores[ids < 0] = -np.inf
    return ids, scores


def _exact_index(dim):
    """An empty index of vectors with ids of their own: they can be added and removed."""
    faiss = optional("faiss")
    return faiss.index_factory(dim, "IDMap2,Flat", faiss.METRIC_INNER_PRODUCT)


def _tokenizer_name(path, name):
    """What corpus.tokenizer takes: ".." in meta.json is the directory in which the index lies."""
    return str(Path(path).parent) if name == ".." else name


def _same(path, kind, made_with, ours, cure):
    line = f"{path}: {kind} {made_with} and {ours} do not compare; {cure}"
    check(made_with == ours, line)


def _embedder_of(encoder, state, path, cure):
    if isinstance(encoder, str) and encoder.startswith("hash"):
        fits = len(state) == HashEmbedder.BUCKETS + 1
        check(fits, f"{path}/embedder.npy is damaged: {len(state)} numbers; {cure}")
    return embedder(encoder, state)


def _read_index(file, meta, cure):
    """A FAISS index that is what meta.json says; it is never in memory twice."""
    check(file.exists(), f"{file} is missing; {cure}")
    check(_checksum(file) == meta["checksum"], f"{file} is damaged or half renewed; {cure}")
    faiss = optional("faiss")
    try:
        index = faiss.read_index(str(file))
    except RuntimeError:
        raise UserError(f"{file} is no index of this FAISS version; {cure}") from None
    fits = index.ntotal == meta["n"] and index.d == meta["dim"]
    check(fits, f"{file} has {index.ntotal:,} vectors of {index.d}, unlike meta.json; {cure}")
    return index


def _checksum(file):
    """The CRC-32 of a file, a block at a time."""
    crc = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


@contextmanager
def _lock(path):
    """One process at a time; a process that dies gives the lock back."""
    Path(path).mkdir(parents=True, exist_ok=True)
    with open(Path(path, "lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- Making an index --------------------------------------------------------------------------
#
# In <path>/parts/, so that a stopped run goes on, and so that several processes share the work:
#     plan.json, embedder.npy, empty.faiss    made once, by whoever comes first
#     1-of-2.codes, 2-of-2.codes              each shard's references, as codes of the index
#     1-of-2.blank, 2-of-2.blank              ids of those that have no vector
# `join` puts the codes into the empty index, in the order of the references. So neither the vectors
# nor two copies of the index are ever in memory, and two shards make the same index as one.

BATCH = 1024  # references that are embedded at a time
FIT = 1 << 20  # references, at most, from which an embedder learns its frequencies
TRAIN = 65_536  # vectors, at most, from which codes are learnt; and a list needs 40
KINDS = "IndexFlat IndexFlatIP IndexScalarQuantizer IndexPQ IndexIVFFlat IndexIVFScalarQuantizer"
KINDS = KINDS.split() + ["IndexIVFPQ"]


def encode_shard(
    path, references, tokenizer_name, encoder, factory=None, shard=(1, 1), progress=True
):
    """Embeds the references of shard (i, n), 1 <= i <= n: those from N(i-1)/n to N i/n. All that is
    needed later lies in `path`/parts. Returns the fitted embedder. See Retriever.build."""
    parts = Path(path, "parts")
    with _lock(path):
        plan, model, index = _prepare(path, references, tokenizer_name, encoder, factory, progress)
    tokenizer = corpus.tokenizer(tokenizer_name)
    i, n_shards = shard
    start = plan["n"] * (i - 1) // n_shards
    stop = plan["n"] * i // n_shards
    size = index.sa_code_size()
    codes = parts / f"{i}-of-{n_shards}.codes"
    blanks = parts / f"{i}-of-{n_shards}.blank"
    with codes.open("ab") as code_file, blanks.open("ab") as blank_file:
        done = codes.stat().st_size // size  # whole codes
        code_file.truncate(done * size)
        known = np.fromfile(blanks, "<i8", blanks.stat().st_size // 8)
        blank_file.truncate(8 * int((known < start + done).sum()))
        bar = tqdm(total=stop - start, initial=done, desc="embedding", disable=not progress)
        with bar:
            for first in range(start + done, stop, BATCH):
                ids = range(first, min(first + BATCH, stop))
                vectors = _vectors(model, references, tokenizer, ids)
                blank = ~vectors.any(1)
                blank_file.write(np.array(ids, "<i8")[blank].tobytes())
                blank_file.flush()  # first: a code vouches for what was said of its reference
                code_file.write(index.sa_encode(vectors).tobytes())
                code_file.flush()
                bar.update(len(ids))
    return model


def _vectors(model, references, tokenizer, ids):
    texts = [normalize(tokenizer.decode(references[i].tolist())) for i in ids]
    vectors = np.asarray(model.encode(texts), np.float32)  # (n, dim)
    for i, vector in zip(ids, vectors, strict=True):
        check(np.isfinite(vector).all(), f"embedder {model.name} gives NaN for reference {i}")
    return vectors


def _prepare(path, references, tokenizer_name, encoder, factory, progress):
    """What all shards share: the plan, the fitted embedder, the trained index without vectors."""
    parts = Path(path, "parts")
    tokenizer = corpus.tokenizer(tokenizer_name)
    model = embedder(encoder)
    factory = (factory or choose_factory(len(references), model.dim)).removeprefix("IDMap2,")
    in_parent = Path(tokenizer_name).resolve() == Path(path).resolve().parent
    plan = dict(
        format=FORMAT,
        n=len(references),
        dim=model.dim,
        embedder=model.name,
        unfitted=model.id,
        factory=factory,
        tokenizer=".." if in_parent else str(tokenizer_name),
        tokenizer_id=tokenizer.id,
        references=references.hash,
    )
    file = parts / "plan.json"
    faiss = optional("faiss")
    if isinstance(encoder, str) and file.exists():
        made = read_json(file, {}, f"remove {parts}: an unfinished index")
        if {key: made.get(key) for key in plan} == plan:
            model = embedder(encoder, np.load(parts / "embedder.npy"))
            return made, model, faiss.read_index(str(parts / "empty.faiss"))
    index = _empty_index(factory, model.dim)
    shutil.rmtree(parts, ignore_errors=True)  # unfinished, and of another plan
    parts.mkdir(parents=True)
    model = _fit(model, references, tokenizer, progress)
    _announce(path, plan, index, model, references, tokenizer, progress)
    _train(index, factory, model, references, tokenizer)
    replace_file(parts / "embedder.npy", lambda f: np.save(f, model.state))
    faiss.write_index(index, str(parts / "empty.faiss"))
    plan["embedder_id"] = model.id
    write_json(file, plan)  # the last: it says that the others are there
    return plan, model, index


def _empty_index(factory, dim):
    """The index that a factory string names. UserError for a kind that we cannot make in parts."""
    faiss = optional("faiss")
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        why = str(error).split("Error: ")[-1].splitlines()[0]
        raise UserError(
            f"--factory {factory}: FAISS cannot make it of {dim} numbers: {why}"
        ) from None
    inner = _inner(index)
    kind = type(inner).__name__
    fits = kind in KINDS and inner.metric_type == faiss.METRIC_INNER_PRODUCT
    cure = "take Flat, SQ8 or PQ64, alone or after IVF1024 or IVF4096_HNSW32"
    check(fits, f"--factory {factory}: an {kind} cannot be made in parts or loses ids; {cure}")
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = min(PROBES, inner.nlist)
        inner.cp.min_points_per_centroid = 1  # no word on stderr
        quantizer = faiss.downcast_index(inner.quantizer)
        if isinstance(quantizer, faiss.IndexHNSW):
            quantizer.hnsw.efSearch = 2 * PROBES  # it looks at so many lists to find the nearest
    return index


def _inner(index):
    """The index that holds the vectors, behind what turns or normalises them first."""
    faiss = optional("faiss")
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def _spread(n, most):
    """At most so many ids, evenly over 0..n-1."""
    return np.linspace(0, n - 1, min(n, most)).astype(np.int64).tolist()


def _fit(model, references, tokenizer, progress):
    ids = tqdm(_spread(len(references), FIT), "counting words", disable=not progress)
    return model.fit(normalize(tokenizer.decode(references[i].tolist())) for i in ids)


def _train(index, factory, model, references, tokenizer):
    """Lists and codes, learnt from a sample of the references."""
    if index.is_trained:
        return
    lists = getattr(_inner(index), "nlist", 0)
    ids = _spread(len(references), max(TRAIN, 40 * lists))
    check(lists <= len(ids), f"--factory {factory}: {lists} lists for {len(ids)} references")
    vectors = np.zeros((len(ids), model.dim), np.float32)
    for i in range(0, len(ids), BATCH):
        vectors[i : i + BATCH] = _vectors(model, references, tokenizer, ids[i : i + BATCH])
    try:
        index.train(vectors)
    except RuntimeError as error:
        why = str(error).split("Error: ")[-1].splitlines()[0]
        line = f"--factory {factory} cannot be trained on {len(ids)} references: {why}"
        raise UserError(line) from None


def predict(n, dim, index):
    """What an index of n vectors will take: bytes in RAM (and on disk), bytes at most while it is
    made, and multiply-adds of its training."""
    inner = _inner(index)
    lists = getattr(inner, "nlist", 0)
    size = n * index.sa_code_size()
    if lists:
        size += 8 * n + lists * (4 * dim + 4 * 2 * 32)  # ids; centroids and their graph
    sample = 0 if index.is_trained else min(n, max(TRAIN, 40 * lists))
    peak = max(size, 4 * dim * (sample + min(sample, 100_000)))  # the sample, and its residuals
    return size, peak, 10 * sample * lists * dim


def _announce(path, plan, index, model, references, tokenizer, progress):
    """Says before it starts what an index will take."""
    if not progress:
        return
    n = plan["n"]
    size, peak, products = predict(n, plan["dim"], index)
    some = _spread(n, BATCH)
    began = time.perf_counter()
    _vectors(model, references, tokenizer, some)
    embedding = (time.perf_counter() - began) * n / max(1, len(some))
    x = np.ones((1024, plan["dim"]), np.float32)
    began = time.perf_counter()
    x @ x.T
    training = (time.perf_counter() - began) * products / (1024 * 1024 * plan["dim"])
    line = f"{path}: {n:,} references as {plan['factory']}, {index.sa_code_size()} bytes each"
    line += f"; {size / 1e6:,.0f} MB in RAM and on disk, at most {peak / 1e6:,.0f} MB of RAM while"
    line += f" it is made; about {training / 60:.1f} min to train, {embedding / 60:.1f} to embed"
    print(line)


def join(path, references, encoder=None, progress=True):
    """Makes the index of all its shards, and returns it, opened with `encoder` (None: that of its
    name). UserError if a shard is not done."""
    faiss = optional("faiss")
    path = Path(path)
    parts = path / "parts"
    cure = _cure(path)
    check((parts / "plan.json").exists(), f"{parts}: no shards to join; {cure}")
    plan = read_json(parts / "plan.json", dict(n=int, references=str, embedder=str), cure)
    cure = _cure(path, plan["embedder"])
    line = f"{parts} is of other references than {references.path}; {cure}"
    check(plan["references"] == references.hash, line)
    index = faiss.read_index(str(parts / "empty.faiss"))
    files = _finished(parts, plan["n"], index.sa_code_size(), cure)
    inner = _inner(index)
    has_lists = isinstance(inner, faiss.IndexIVF)
    if has_lists:
        _reserve(inner, files)
    at = 0
    with tqdm(total=plan["n"], desc="joining", disable=not progress) as bar:
        for codes in _blocks(files, index.sa_code_size()):
            if has_lists:
                inner.add_sa_codes(codes, np.arange(at, at + len(codes)))
            else:
                inner.add_sa_codes(codes)
            at += len(codes)
            bar.update(len(codes))
    index.ntotal = inner.ntotal
    blank = []
    for file in files:
        blank += np.fromfile(file.with_suffix(".blank"), "<i8").tolist()
    made = path / "index.faiss.tmp"
    faiss.write_index(index, str(made))
    checksum = _checksum(made)
    made.replace(path / "index.faiss")
    shutil.copy(parts / "embedder.npy", path / "embedder.npy")
    meta = {key: plan[key] for key in META if key in plan}
    write_json(path / "meta.json", meta | dict(checksum=checksum, blank=blank, least=0.0))
    shutil.rmtree(parts)
    Path(path, "changes.npz").unlink(missing_ok=True)  # of an older index
    del index, inner
    return Retriever.open(path, encoder)


def _finished(parts, n, size, cure):
    """The code files of one complete set of shards, in order."""
    shards = {}  # how many -> which
    for file in parts.glob("*-of-*.codes"):
        i, n_shards = file.stem.split("-of-")
        shards.setdefault(int(n_shards), set()).add(int(i))
    missing = "1/1"
    for n_shards in sorted(shards):
        files = []
        for i in range(1, n_shards + 1):
            rows = n * i // n_shards - n * (i - 1) // n_shards
            file = parts / f"{i}-of-{n_shards}.codes"
            if not file.exists() or file.stat().st_size != rows * size:
                missing = f"{i}/{n_shards}"
                break
            files.append(file)
        if len(files) == n_shards:
            return files
    command = cure.partition(": ")[2]
    raise UserError(f"{parts}: shard {missing} is not done: run {command} --shard {missing}")


def _blocks(files, size, rows=65_536):
    """All codes of the files (n, size) uint8, some rows at a time."""
    for file in files:
        with file.open("rb") as f:
            while data := f.read(rows * size):
                yield np.frombuffer(data, np.uint8).reshape(-1, size)


def _reserve(inner, files):
    """Makes each inverted list as large as it will be: else they grow by doubling."""
    faiss = optional("faiss")
    size = inner.sa_code_size()
    n_bytes = inner.coarse_code_size()  # the list's number comes first in a code, low byte first
    counts = np.zeros(inner.nlist, np.int64)
    weights = 256 ** np.arange(n_bytes)
    for codes in _blocks(files, size):
        lists = codes[:, :n_bytes].astype(np.int64) @ weights  # (n,)
        counts += np.bincount(lists, minlength=inner.nlist)
    lists = faiss.downcast_InvertedLists(inner.invlists)
    for i, count in enumerate(counts.tolist()):
        lists.resize(i, count)
        lists.resize(i, 0)  # the room stays


# -- Other sources ----------------------------------------------------------------------------


class Random:
    """Recalls k memories at random, whatever the query: the noise baseline."""

    def __init__(self, n, seed=0):
        self.n = n
        self.rng = np.random.default_rng(seed)

    def search(self, queries, k):
        shape = (len(queries), k)
        if self.n == 0:
            return np.full(shape, -1), np.full(shape, NOTHING)
        return self.rng.integers(0, self.n, shape), np.zeros(shape)


class Given:
    """Recalls references ids (B, n), whatever the query: the right one of each sequence, say."""

    def __init__(self, ids):
        self.ids = np.asarray(ids)

    def search(self, queries, k):
        ids = np.full((len(queries), k), -1)
        sequence = np.arange(len(queries)) % len(self.ids)  # queries come chunk by chunk
        ids[:, : self.ids.shape[1]] = self.ids[sequence, :k]
        return ids, np.zeros((len(queries), k))


class Filtered:
    """A retriever that recalls no copy of its query: a reference that overlaps it by more than the
    threshold, eq. (3.3), is dropped, and the next best takes its place (sec. 4.4)."""

    def __init__(self, retriever, references, threshold=2 / 3, extra=16):
        self.retriever = retriever
        self.references = references
        self.threshold = threshold
        self.extra = extra  # references that are searched beyond k

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

# What neighbours were made of and for: the .json beside <split>.neighbors.bin
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
    """The k best references, best first, of chunks start..stop that are no copies of their texts.

    tokens (n,): a split; chunk c, tokens [cC, (c+1)C), is the query for k + extra references. Those
    that overlap the aligned window of `context` tokens around it by more than the threshold (3.3)
    are dropped: with the answer in memory nothing is learnt. (stop - start, k) int32, -1 = none.
    """
    line = f"--context {context}: give a multiple of chunk_len {chunk_len}"
    check(context >= chunk_len and context % chunk_len == 0, line)
    n_chunks = len(tokens) // chunk_len
    stop = n_chunks if stop is None else min(stop, n_chunks)
    chunks = np.asarray(tokens[start * chunk_len : stop * chunk_len]).reshape(-1, chunk_len)
    ids, _ = retriever.search(chunks, k + extra)  # (stop - start, k + extra)
    out = np.full((len(chunks), k), -1, np.int32)
    copied = {}  # (sequence, reference) -> whether the one holds a copy of the other
    for row, found in enumerate(ids.tolist()):
        sequence = (start + row) * chunk_len // context
        window = tokens[sequence * context : (sequence + 1) * context]
        kept = []
        for i in found:
            if i < 0 or len(kept) == k:
                break
            if (sequence, i) not in copied:  # chunks of one sequence find the same references
                copied[sequence, i] = exceeds(window, references[i], threshold)
            if not copied[sequence, i]:
                kept.append(i)
        out[row, : len(kept)] = kept
    return out


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
):
    """Writes `neighbors` of a split: path (int32, (n_chunks, k)) and the same name in .json.

    After a kill it goes on where it stopped, unless something it depends on has changed.
    KeyboardInterrupt then says how far it came.
    """
    path = Path(path)
    index = retriever.path
    n_chunks = len(tokens) // chunk_len
    cure = _cure(index, retriever.embedder.name)
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
    part = Path(f"{path}.part")
    done = 0
    if part.exists() and _sidecar(side) == meta:
        done = part.stat().st_size // (4 * k)  # whole rows of int32
    path.unlink(missing_ok=True)  # until the end the sidecar speaks of the .part
    with part.open("ab") as file:
        file.truncate(4 * k * done)  # first: what another sidecar was for must not count as ours
        write_json(side, meta)
        with tqdm(total=n_chunks, initial=done, unit=" chunks", disable=not progress) as bar:
            try:
                while done < n_chunks:
                    stop = min(done + batch, n_chunks)
                    rows = neighbors(
                        tokens,
                        chunk_len,
                        references,
                        retriever,
                        k,
                        threshold=threshold,
                        context=context,
                        start=done,
                        stop=stop,
                    )
                    file.write(rows)
                    file.flush()
                    bar.update(len(rows))
                    done = stop
            except KeyboardInterrupt:
                kept = f"after {done:,} of {n_chunks:,} chunks, which are kept"
                raise KeyboardInterrupt(f"{kept}: the same command goes on") from None
    part.replace(path)


def _sidecar(side):
    """The .json of neighbours that are not finished; None where there is none to go on with."""
    try:
        return read_json(side, NEIGHBORS, "")
    except UserError:
        return None


def open_neighbors(data, split, chunk_len=None, context=None):
    """The neighbours of a split in a data directory: (n_chunks, k) int32, and its references' name.

    chunk_len, context: those of the training that will use them. UserError if the split, the
    references or the chunk_len are not those they were made for, or if copies were filtered out of
    other windows than those that are trained on.
    """
    path = Path(f"{data}/{split}.neighbors.bin")
    side = path.with_suffix(".json")
    wanted = dict(
        references=_references_for(data, split), chunk_len=chunk_len or 64, context=context or 2048
    )
    cure = _neighbors_cure(data, split, wanted)
    if not side.exists() or not path.exists():
        raise UserError(f"{path}: no neighbours here; {cure}")
    meta = read_json(side, NEIGHBORS, cure)
    for name in ("chunk_len", "context", "k", "n_chunks"):
        check(meta[name] >= 1, f"{side} is damaged: {name} {meta[name]}; {cure}")
    wanted = dict(
        references=meta["name"],
        chunk_len=chunk_len or meta["chunk_len"],
        context=context or meta["context"],
        k=meta["k"],
        threshold=meta["threshold"],
    )
    cure = _neighbors_cure(data, split, wanted)
    tokens = corpus.open_tokens(data, split)
    now = dict(
        chunk_len=wanted["chunk_len"],
        references=corpus.References.open(f"{data}/{meta['name']}").hash,
        n_tokens=len(tokens),
        tokens=digest(tokens),
    )
    for key, value in now.items():
        check(meta[key] == value, f"{path} is for {key} {meta[key]}, not {value}; {cure}")
    # A window of the training must lie within one window of the filter
    nested = meta["context"] % wanted["context"] == 0
    line = f"{path}: copies were filtered from windows of {meta['context']} tokens, not of"
    check(nested, f"{line} {wanted['context']}; {cure}")
    size = 4 * meta["n_chunks"] * meta["k"]
    check(path.stat().st_size == size, f"{path} is cut off; {cure}")
    return np.memmap(path, np.int32, "r", shape=(meta["n_chunks"], meta["k"])), meta["name"]


def _references_for(data, split):
    """The references, among those in a data directory, from which a split may best recall."""
    there = sorted(file.stem for file in Path(data).glob("*.idx"))
    # the training text must not recall the knowledge base that it is tested with
    order = ("train_refs", "kb") if split == "explicit" else ("kb", "train_refs")
    for name in (*order, *there):
        if name in there:
            return name
    return "kb"


def _neighbors_cure(data, split, flags):
    command = ["--data", str(data), "--split", split]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    return f"make them with: python retrieval.py neighbors {shlex.join(command)}"


# -- The command line -------------------------------------------------------------------------


def _whole(text):
    """A whole number from 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1")
    return int(text)


def _share(text):
    """A number from 0 to 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 0 to 1")
    return value


def _shard(text):
    """ "2/3" -> (2, 3), for argparse."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text}: give i/n with 1 <= i <= n, as 1/4")
    return int(match[1]), int(match[2])


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=main.__doc__, **form)
    commands = p.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="embed references, so that they are found", **form)
    join_ = commands.add_parser("join", help="make the index of its finished shards", **form)
    near = commands.add_parser("neighbors", help="references for every training chunk", **form)
    for command in (index, join_, near):
        command.add_argument("--data", required=True, help="prepared data directory: data/cities")
        command.add_argument("--references", default="kb", help="its references: kb, train_refs")
    index.add_argument("--embedder", default="hash", help="hash, hash:DIM, bge-m3 or hf:NAME")
    index.add_argument("--factory", help="FAISS factory string (None: chosen by size)")
    shard_help = "i/n: only this share of the references, to be joined with the others"
    index.add_argument("--shard", type=_shard, metavar="i/n", help=shard_help)
    near.add_argument("--split", default="explicit", help="token file whose chunks are the queries")
    near.add_argument("--chunk_len", type=_whole, default=64, help="C, tokens a chunk")
    near.add_argument("--k", type=_whole, default=1, help="references a chunk (paper: 1)")
    near.add_argument("--threshold", type=_share, default=0.9, help="largest overlap, eq. (3.3)")
    near.add_argument("--context", type=_whole, default=2048, help="tokens of a train sequence")
    return p


def main(argv=None):
    """index writes <data>/<references>.index/, in shards if wanted, which join puts together;
    neighbors writes <data>/<split>.neighbors.bin and .json (and the index with its default options,
    where there is none). All go on where they were stopped."""
    a = parser().parse_args(argv)
    path = f"{a.data}/{a.references}.index"
    references = corpus.References.open(f"{a.data}/{a.references}")
    if a.command == "index":
        write_index(path, references, a)
    elif a.command == "join":
        report(path, join(path, references))
    else:
        find_neighbors(path, references, a)


def write_index(path, references, a):
    if a.shard is None:
        report(path, Retriever.build(path, references, a.data, a.embedder, a.factory))
        return
    encode_shard(path, references, a.data, a.embedder, a.factory, a.shard)
    flags = shlex.join(["--data", a.data, "--references", a.references])
    print(f"{path}: shard {a.shard[0]} of {a.shard[1]} is done; with all of them there, run")
    print(f"python retrieval.py join {flags}")


def find_neighbors(path, references, a):
    if not Path(path, "meta.json").exists():
        report(path, Retriever.build(path, references, a.data))
    tokens = corpus.open_tokens(a.data, a.split)
    out = f"{a.data}/{a.split}.neighbors.bin"
    retriever = Retriever.open(path, references=references)
    how = dict(threshold=a.threshold, context=a.context)
    write_neighbors(out, tokens, a.chunk_len, references, retriever, a.k, **how)
    rows, _ = open_neighbors(a.data, a.split)
    empty = (np.asarray(rows) < 0).mean()
    print(f"{out}: {len(rows):,} chunks x {a.k}, {empty:.2%} empty")


def report(path, retriever):
    factory = retriever.meta["factory"]
    print(f"{path}: {len(retriever):,} references, {retriever.embedder.id}, {factory}")


if __name__ == "__main__":
    run(main)
