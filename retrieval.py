"""Retrieval: which reference a chunk should recall (sec. 3.1) and which it must not see (sec. 3.6).

overlap      eq. (3.3): how much of a reference a train sequence already contains
embedder     text -> unit vector; one and the same object embeds references and queries
Retriever    a FAISS index of references with its embedder, in one directory
neighbors    the best references of every training chunk that are no copies of it
"""

import argparse
import hashlib
import json
import re
import zlib
from collections import Counter
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import corpus
from common import check, optional, replace_file, run, write_json


def overlap(t, r, threshold=None):
    """The share of reference r that stands, in order, in one window of train sequence t: eq. (3.3).

        max N with t_{i_k} = r_{j_k}, k = 1..N, both rising, i_N - i_1 <= 2|r|;   over |r|

    (printed r_{i_k}: an erratum). t, r: token ids. Exact, in [0, 1]; with a threshold only so far
    as tells whether it is larger. ValueError if r is empty. Where |r| = 3, a window has 7 tokens:
    >>> overlap([9, 1, 0, 0, 2, 0, 0, 3, 9], [1, 2, 3])
    1.0
    >>> round(overlap([9, 1, 0, 0, 2, 0, 0, 0, 3, 9], [1, 2, 3]), 3)
    0.667
    """
    t, r = np.asarray(t).tolist(), np.asarray(r).tolist()
    check(r, "overlap with an empty reference: eq. (3.3) divides by its length")
    best, enough, n, width = 0, len(r), len(r), 2 * len(r) + 1  # N so far; N that ends the search
    if threshold is not None:
        enough = sum(x / n <= threshold for x in range(n + 1))  # the smallest N above it
        best = enough - 1
        if (Counter(t) & Counter(r)).total() < enough:  # what they share in any order
            return best / n
    # Bit-parallel (Crochemore et al. 2001): bit j of v is 0 where the subsequence grows at r_j, and
    # a token of t updates all of r in three operations on |r|-bit integers. Moving a window by one
    # token changes its N by at most one, so a window x short of `best` rules out the next x.
    bits = Counter()
    for j, token in enumerate(r):
        bits[token] |= 1 << j
    match, start = [bits[token] for token in t], 0  # |t| integers: where in r this token stands
    while start < max(1, len(t) - width + 1) and best < enough:
        v = ones = (1 << n) - 1
        for m in match[start : start + width]:
            u = v & m
            v = (v + u) | (v - u)  # what is carried beyond bit n never comes back
        length = n - (v & ones).bit_count()
        best, start = max(best, length), start + max(best - length, 0) + 1
    return best / n


def exceeds(t, r, threshold):
    """overlap(t, r) > threshold (paper: 0.9 in training, sec. 3.6; 2/3 in evaluation, sec. 4.4)."""
    return overlap(t, r, threshold) > threshold


# -- Embedders: .encode(n texts) -> (n, dim) float32, each of length 1; .fit(texts) -> an embedder;
#    .name, .id (names the vectors exactly), .dim, .state (what fit has learnt)

WORD = re.compile(r"\w+")


def _digest(array):
    return hashlib.blake2b(np.ascontiguousarray(array)).hexdigest()[:16]


class HashEmbedder:
    """Hashed tf-idf of words and of their character 3- and 4-grams: no download, no training.
    A word is the signed, idf-weighted sum of its features ("<kyiv>", "<ky", "kyi", ..., "yiv>"),
    a text the normalised sum of its words; without any word it is zero. The same on every machine:
    CRC-32, not Python's salted hash, and an id made of integer counts, not of their logarithms."""

    CACHE = 1 << 16  # words whose vectors are kept: 128 MB, once there are so many

    def __init__(self, dim=512, state=None):
        self.dim, self.name = dim, f"hash:{dim}"
        # documents with feature 0, 1, ..., 2^18 - 1, and the number of documents: all it learns
        self.state = np.zeros((1 << 18) + 1, "<u4") if state is None else state
        self.id = f"{self.name}:{_digest(self.state)[:12]}"
        self.idf = np.log((self.state[-1] + 2.0) / (self.state[:-1] + 1.0))
        self._vector = lru_cache(self.CACHE)(self._vector)  # words repeat

    def fit(self, texts):
        """Another one, with document frequencies: how many texts have each feature."""
        texts = [set(WORD.findall(text.casefold())) for text in texts]
        n, df = len(texts), np.zeros(1 << 18)
        for word, count in Counter(word for text in texts for word in text).items():
            np.add.at(df, self._features(word) & len(df) - 1, count)
        df = np.minimum(df, n)  # a text with two words of one feature was counted twice
        return HashEmbedder(self.dim, np.append(df, n).astype("<u4"))

    @staticmethod
    def _features(word):
        """Their hashes: bits 0-17 name the feature, 18-30 its dimension, 31 its sign."""
        s = f"<{word}>"
        grams = [s[i : i + n] for n in (3, 4) for i in range(len(s) - n + 1)]
        return np.array([zlib.crc32(gram.encode("utf-8", "replace")) for gram in ["=" + s, *grams]])

    def _vector(self, word):
        h = self._features(word)
        signed = self.idf[h & len(self.idf) - 1] * np.where(h >> 31, -1, 1)
        return np.bincount((h >> 18 & 0x1FFF) % self.dim, signed, self.dim).astype(np.float32)

    def encode(self, texts):
        out = np.zeros((len(texts), self.dim), np.float32)
        for x, text in zip(out, texts, strict=True):  # x (dim,): a row of out
            for word in WORD.findall(text.casefold()):
                x += self._vector(word)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)


class HuggingFaceEmbedder:
    """Any Hugging Face encoder: the normalised output feature of its first token, <cls> (3.1)."""

    def __init__(self, name):
        transformers = optional("transformers")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = transformers.AutoModel.from_pretrained(name).eval().to(device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        self.dim, self.state = self.model.config.hidden_size, np.zeros(0, "<u4")
        self.name, self.id = f"hf:{name}", f"hf:{name}:{self.dim}"

    def fit(self, texts):
        return self

    @torch.inference_mode()
    def encode(self, texts):
        out, form = torch.zeros(len(texts), self.dim), dict(padding=True, truncation=True)
        for i in range(0, len(texts), 64):
            batch = self.tokenizer(texts[i : i + 64], return_tensors="pt", **form)
            out[i : i + 64] = self.model(**batch.to(self.model.device)).last_hidden_state[:, 0]
        return torch.nn.functional.normalize(out, dim=-1).numpy()


def embedder(name, state=None):
    """The embedder called "hash", "hash:DIM", "hf:NAME" or "bge-m3" (the paper's), or ValueError.
    state: the .state of the same embedder after .fit, from disk. An object is returned as it is."""
    if not isinstance(name, str):
        return name
    name = {"hash": "hash:512", "bge-m3": "hf:BAAI/bge-m3"}.get(name, name)
    if name.startswith("hf:"):
        return HuggingFaceEmbedder(name[3:])
    known = re.fullmatch(r"hash:[1-9]\d*", name)
    check(known, f"unknown embedder {name!r}: take hash, hash:DIM, bge-m3 or hf:NAME")
    return HashEmbedder(int(name[5:]), state)


# -- The index --------------------------------------------------------------------------------


def choose_factory(n):
    """The FAISS factory string for n vectors: exact to 100,000, then about 4 sqrt(n) lists. One
    thread, 120,000 x 512: 1,100 queries a second; with lists 3,500, and 0.996 find their best.
    >>> choose_factory(20_000), choose_factory(1_000_000)
    ('IDMap2,Flat', 'IVF4096,Flat')
    """
    return "IDMap2,Flat" if n <= 100_000 else f"IVF{1 << round(np.log2(4 * n**0.5))},Flat"


def _cure(path, embedder=None):
    """What makes an index that is missing or wrong, as a command with its flags."""
    command = f"index --data {Path(path).parent} --references {Path(path).stem}"
    command += f" --embedder {embedder}" if embedder else ""
    return f"make it anew with: python retrieval.py {command}"


class Retriever:
    """References that are found by text. On disk: index.faiss, embedder.npy, meta.json."""

    def __init__(self, path, index, embedder, tokenizer, meta):
        self.path, self.index, self.meta = path, index, meta
        self.embedder, self.tokenizer = embedder, tokenizer  # of the references and the queries

    def __len__(self):
        return self.index.ntotal

    @staticmethod
    def build(path, references, tokenizer_name, encoder="hash", factory=None, progress=True):
        """Indexes a corpus.References (id = row) and writes the directory `path`.
        encoder: an embedder or its name. factory: a FAISS factory string instead of our choice."""
        faiss, n, tokenizer = optional("faiss"), len(references), corpus.tokenizer(tokenizer_name)
        texts = [tokenizer.decode(reference) for reference in references]
        model, factory = embedder(encoder).fit(texts), factory or choose_factory(n)
        if "IVF" not in factory and not factory.startswith("IDMap"):
            factory = f"IDMap2,{factory}"  # a flat index keeps no ids, an inverted one does
        steps = tqdm(range(0, n, 1024), f"embedding {n:,} references", disable=not progress)
        vectors = np.concatenate([model.encode(texts[i : i + 1024]) for i in steps])  # (n, dim)
        index = faiss.index_factory(model.dim, factory, faiss.METRIC_INNER_PRODUCT)
        if "IVF" in factory:
            lists = faiss.extract_index_ivf(index)
            lists.nprobe, lists.cp.max_points_per_centroid = 16, 64
            lists.set_direct_map_type(faiss.DirectMap.Hashtable)  # from an id to its vector
        index.train(vectors)
        index.add_with_ids(vectors, np.arange(n))
        meta = dict(
            embedder=model.name,
            embedder_id=model.id,
            factory=factory,
            tokenizer=str(tokenizer_name),
            tokenizer_id=tokenizer.id,
        )
        return Retriever(path, index, model, tokenizer, meta).save(references)

    @staticmethod
    def open(path, encoder=None, references=None):
        """Opens what save wrote. encoder: an embedder or its name, instead of that of the index.
        references: those that the ids are to name. UserError without an index, or
        if its parts, or it and the references, do not belong together."""
        file = Path(path, "meta.json")
        check(file.exists(), f"{path}: no index here; {_cure(path)}")
        meta, blob = json.loads(file.read_text()), np.fromfile(f"{path}/index.faiss", np.uint8)
        model = embedder(encoder or meta["embedder"], np.load(f"{path}/embedder.npy"))
        tokenizer, cure = corpus.tokenizer(meta["tokenizer"]), _cure(path, model.name)
        for kind, ours in dict(embedder=model, tokenizer=tokenizer).items():
            its = meta[f"{kind}_id"]  # what the index was made with
            check(its == ours.id, f"{path}: {kind} {its} and {ours.id} do not compare; {cure}")
        check(zlib.crc32(blob) == meta["crc"], f"{path} is damaged or half renewed; {cure}")
        same = references is None or references.hash == meta["references"]
        check(same, f"{path} is stale: its references have changed since; {cure}")
        return Retriever(path, optional("faiss").deserialize_index(blob), model, tokenizer, meta)

    def save(self, references=None):
        """Writes the index as it is now. references: what it stands for after live changes.
        meta.json comes last and has the checksum: what a kill leaves opens whole or not at all."""
        blob = optional("faiss").serialize_index(self.index)
        names = references.hash if references else self.meta["references"]
        self.meta |= dict(n=len(self), crc=zlib.crc32(blob), references=names)
        Path(self.path).mkdir(parents=True, exist_ok=True)
        replace_file(f"{self.path}/embedder.npy", lambda f: np.save(f, self.embedder.state))
        replace_file(f"{self.path}/index.faiss", lambda f: f.write(blob))
        write_json(f"{self.path}/meta.json", self.meta)
        return self

    def search(self, queries, k):
        """The k references most similar to each query (cosine, sec. 3.1), best first.
        queries: n texts, or n token sequences: lists, or integers (n, m) with -1 = padding.
        Returns ids (n, k) int64 (-1: an inverted index found no more), scores (n, k) float32."""
        check(
            1 <= k <= len(self), f"{self.path}: k = {k} of N = {len(self)} references, not 1 to N"
        )
        check(not isinstance(queries, str), "search takes a list of texts, not one text")
        queries = queries.tolist() if hasattr(queries, "tolist") else queries
        texts = [q if isinstance(q, str) else self.tokenizer.decode(q) for q in queries]
        # From so many queries x dim on FAISS takes BLAS (default: 128,000); from 4 queries it pays.
        optional("faiss").cvar.distance_compute_blas_threshold = 4 * self.embedder.dim
        return self.index.search(self.embedder.encode(texts), k)[::-1]

    def _has(self, i):
        try:
            return self.index.reconstruct(int(i)) is not None
        except RuntimeError:
            return False

    def add(self, ids, texts):
        """Like remove and replace: searches know it at once, the disk only after save()."""
        new = len({*ids}) == len(ids) == len(texts) and not any(map(self._has, ids))
        check(new, f"add: one text for each id, and no id that is there already: {ids}")
        self.index.add_with_ids(self.embedder.encode(texts), np.array(ids, np.int64))

    def remove(self, ids):
        unknown = [i for i in ids if not self._has(i)]
        check(not unknown, f"{self.path} has no references {unknown} to remove or replace")
        self.index.remove_ids(np.array(ids, np.int64))

    def replace(self, ids, texts):
        self.remove(ids)
        self.add(ids, texts)


# -- Other sources: anything with .search(queries, k) -> ids (n, k), scores (n, k) --------------


class Random:
    """Recalls k memories at random, whatever the query: what noise does."""

    def __init__(self, n, seed=0):
        self.n, self.rng = n, np.random.default_rng(seed)

    def search(self, queries, k):
        return self.rng.integers(0, self.n, (len(queries), k)), np.zeros((len(queries), k))


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
        self.retriever, self.references = retriever, references
        self.threshold, self.extra = threshold, extra

    def search(self, queries, k):
        """queries: token lists. As Retriever.search: ids (n, k), -1 = none; scores (n, k)."""
        most = max(k, min(k + self.extra, len(self.references)))
        ids, scores = self.retriever.search(queries, most)
        for query, found, score in zip(queries, ids, scores, strict=True):
            fit = [i >= 0 and not exceeds(query, self.references[i], self.threshold) for i in found]
            n = min(k, sum(fit))
            found[:n], score[:n], found[n:] = found[fit][:n], score[fit][:n], -1
        return ids[:, :k], scores[:, :k]


# -- Neighbours for training (sec. 3.6) -------------------------------------------------------


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
    stop=float("inf"),
):
    """The k best references, best first, of chunks start..stop that are no copies of their texts.

    tokens (n,): a split; chunk c, tokens [cC, (c+1)C), is the query for k + extra references. Those
    that overlap the aligned window of `context` tokens around it by more than the threshold (3.3)
    are dropped: with the answer in memory nothing is learnt. (stop - start, k) int32, -1 = none."""
    check(
        context % chunk_len == 0, f"--context {context}: give a multiple of chunk_len {chunk_len}"
    )
    stop = min(stop, len(tokens) // chunk_len)
    chunks = np.asarray(tokens[start * chunk_len : stop * chunk_len]).reshape(-1, chunk_len)
    ids, _ = retriever.search(chunks, max(k, min(k + extra, len(retriever))))  # (n, k + extra)
    out = np.full((len(chunks), k), -1, np.int32)
    # chunks of one sequence s find the same references
    copied = cache(lambda s, i: exceeds(tokens[s * context :][:context], references[i], threshold))
    for c, found in enumerate(ids.tolist(), start):
        fit = (i for i in found if i >= 0 and not copied(c * chunk_len // context, i))
        for j, i in enumerate(islice(fit, k)):  # so only what is needed is looked at
            out[c - start, j] = i
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
    After a kill it goes on where it stopped, unless something it depends on has changed."""
    index, its, n = retriever.path, retriever.meta, len(tokens) // chunk_len
    cure = _cure(index, retriever.embedder.name)
    check(its["references"] == references.hash, f"{index}: an index of other references; {cure}")
    check(n, f"{path}: the split has no {chunk_len} tokens: give a smaller --chunk_len")
    options = dict(threshold=threshold, context=context)
    meta = dict(
        options,
        chunk_len=chunk_len,
        k=k,
        n_chunks=n,
        n_tokens=len(tokens),
        index=its,
        tokens=_digest(tokens),
        name=Path(references.path).name,
        references=references.hash,
    )
    side, part, done = Path(path).with_suffix(".json"), Path(f"{path}.part"), 0
    if part.exists() and side.exists() and json.loads(side.read_text()) == meta:
        done = part.stat().st_size // (4 * k)  # whole rows of int32
    Path(path).unlink(missing_ok=True)  # until the end the sidecar speaks of the .part
    with part.open("ab") as f:
        f.truncate(4 * k * done)  # first: what another sidecar was for must not count as ours
        write_json(side, meta)
        for i in tqdm(range(done, n, batch), f"{batch} chunks", disable=not progress):
            rows = dict(start=i, stop=i + batch)
            f.write(neighbors(tokens, chunk_len, references, retriever, k, **rows, **options))
            f.flush()
    part.replace(path)


def open_neighbors(data, split, chunk_len=None):
    """The neighbours of a split in a data directory: (n_chunks, k) int32, and its references' name.
    Refused if the split, the references or the chunk_len are not those they were made for."""
    path = Path(f"{data}/{split}.neighbors.bin")
    side = path.with_suffix(".json")
    cure = f"make them with: python retrieval.py neighbors --data {data} --split {split}"
    have, flags = side.exists() and path.exists(), f"--chunk_len {chunk_len or 'C'} --context T"
    line = f"{path}: no neighbours here; {cure} --references NAME {flags}"
    check(have, line)
    meta, tokens = json.loads(side.read_text()), corpus.open_tokens(data, split)
    references = corpus.References.open(f"{data}/{meta['name']}").hash
    now = dict(
        chunk_len=chunk_len or meta["chunk_len"],
        references=references,
        n_tokens=len(tokens),
        tokens=_digest(tokens),
    )
    cure += f" --references {meta['name']} --chunk_len {now['chunk_len']}"
    cure += "".join(f" --{x} {meta[x]}" for x in ("context", "k", "threshold") if x in meta)
    for key, value in now.items():
        then = meta.get(key, value)
        check(then == value, f"{path} is for {key} {then}, not {value}; {cure}")
    check(path.stat().st_size == 4 * meta["n_chunks"] * meta["k"], f"{path} is cut off; {cure}")
    return np.memmap(path, np.int32, "r", shape=(meta["n_chunks"], meta["k"])), meta["name"]


def main(argv=None):
    """index writes <data>/<references>.index/, neighbors <data>/<split>.neighbors.bin and .json
    (and the index with its default options, where there is none)."""
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(description=main.__doc__, **form)
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="embed references, so that they are found", **form)
    near = commands.add_parser("neighbors", help="references for every training chunk", **form)
    for command in (index, near):
        command.add_argument("--data", required=True, help="prepared data directory: data/cities")
        command.add_argument("--references", default="kb", help="its references: kb, train_refs")
    index.add_argument("--embedder", default="hash", help="hash, hash:DIM, bge-m3 or hf:NAME")
    index.add_argument("--factory", help="FAISS factory string (None: chosen by size)")
    near.add_argument("--split", default="explicit", help="token file whose chunks are the queries")
    near.add_argument("--chunk_len", type=int, default=64, help="C, tokens a chunk")
    near.add_argument("--k", type=int, default=1, help="references a chunk (paper: 1)")
    near.add_argument("--threshold", type=float, default=0.9, help="largest overlap, eq. (3.3)")
    near.add_argument("--context", type=int, default=2048, help="tokens of a train sequence")
    near.set_defaults(embedder="hash", factory=None)
    a = parser.parse_args(argv)
    path = f"{a.data}/{a.references}.index"
    references = corpus.References.open(f"{a.data}/{a.references}")
    if a.command == "index" or not Path(path, "meta.json").exists():
        made = Retriever.build(path, references, a.data, a.embedder, a.factory)
        print(f"{path}: {len(made):,} references, {made.embedder.id}, {made.meta['factory']}")
    if a.command == "neighbors":
        tokens, out = corpus.open_tokens(a.data, a.split), f"{a.data}/{a.split}.neighbors.bin"
        retriever = Retriever.open(path, references=references)
        write_neighbors(
            out,
            tokens,
            a.chunk_len,
            references,
            retriever,
            a.k,
            threshold=a.threshold,
            context=a.context,
        )
        rows, _ = open_neighbors(a.data, a.split)
        print(f"{out}: {len(rows):,} chunks x {a.k}, {(rows < 0).mean():.2%} empty")


if __name__ == "__main__":
    run(main)
