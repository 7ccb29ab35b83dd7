"""Retrieval: which reference a chunk should recall (sec. 3.1) and which it must not see (sec. 3.6).

    overlap      eq. (3.3): how much of a reference a train sequence already contains
    embedder     text -> unit vector; one and the same object embeds references and queries
    Retriever    a FAISS index of references with its embedder, in one directory
    neighbors    the best references of every training chunk that are no copies of it

Left out: retrieval with the model's own hidden features (Remark 3.1).
"""

import argparse
import functools
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import corpus

# -- Overlap, eq. (3.3) -----------------------------------------------------------------------

def overlap(t, r):
    """The share of reference r that stands, in order, in one window of train sequence t: eq. (3.3).

        max N with t_{i_k} = r_{j_k}, k = 1..N, both rising, i_N - i_1 <= 2|r|;   over |r|

    (printed r_{i_k}: an erratum). t, r: token ids. Exact, in [0, 1]. ValueError if r is empty.
    Here |r| = 3, so a window has 7 tokens; one filler more, and 1 and 3 no longer share a window:

    >>> overlap([9, 1, 0, 0, 2, 0, 0, 3, 9], [1, 2, 3])
    1.0
    >>> round(overlap([9, 1, 0, 0, 2, 0, 0, 0, 3, 9], [1, 2, 3]), 3)
    0.667
    """
    t, r = _lists(t, r)
    return _longest(t, r) / len(r)

def exceeds(t, r, threshold):
    """overlap(t, r) > threshold (paper: 0.9 in training, sec. 3.6; 2/3 in evaluation, sec. 4.4).

    The tokens that t and r share in any order bound it from above. Only a pair that passes the
    bound meets the exact program, which then stops at the first window that decides."""
    t, r = _lists(t, r)
    need = sum(n / len(r) <= threshold for n in range(len(r) + 1))  # smallest N that exceeds
    return (Counter(t) & Counter(r)).total() >= need and _longest(t, r, need - 1) >= need

def _lists(t, r):
    if len(r) == 0:
        raise ValueError("overlap with an empty reference: eq. (3.3) divides by its length")
    return np.asarray(t).tolist(), np.asarray(r).tolist()

def _longest(t, r, best=0):
    """N of eq. (3.3). With `best` > 0: only whether it is larger; returns the first that is.

    Bit-parallel (Crochemore et al. 2001): bit j of v is 0 where the subsequence grows at r_j, and
    a token of t updates all of r in three operations on |r|-bit integers. Moving a window by one
    token changes its answer by at most one, so a window x short of `best` rules out the next x."""
    n, width = len(r), 2 * len(r) + 1
    bits = Counter()
    for j, token in enumerate(r):
        bits[token] |= 1 << j
    match = [bits[token] for token in t]  # |t| integers: where in r this token stands
    enough, start = best + 1 if best else n, 0
    while start < max(1, len(t) - width + 1) and best < enough:
        v = ones = (1 << n) - 1
        for m in match[start : start + width]:
            u = v & m
            v = (v + u) | (v - u)  # what is carried beyond bit n never comes back
        length = n - (v & ones).bit_count()
        best, start = max(best, length), start + max(best - length, 0) + 1
    return best

# -- Embedders: .name, .id (names the vectors exactly), .dim, .fit(texts), .encode(texts), .state

WORD = re.compile(r"\w+")

class HashEmbedder:
    """Hashed tf-idf of words and of their character 3- and 4-grams: no download, no training.

    A word is the signed, idf-weighted sum of its features ("<kyiv>", "<ky", "kyi", ..., "yiv>"),
    a text the normalised sum of its words; without any word it is zero. The same on every machine:
    CRC-32, not Python's salted hash, and an id made of integer counts, not of their logarithms.
    On data/cities (20,000 references) the right one is first for this share of the questions: 256
    dimensions 0.977; 384 0.992; 512 0.994; and 512 counting each word of a text once 0.944."""

    CACHE = 1 << 16  # words whose vectors are kept: 128 MB, once there are so many

    def __init__(self, dim=512, state=None):
        self.dim, self.name = dim, f"hash:{dim}"
        # documents with feature 0, 1, ..., 2^18 - 1, and the number of documents: all it learns
        self.state = np.zeros((1 << 18) + 1, "<u4") if state is None else state
        self.id = f"{self.name}:{hashlib.blake2b(self.state.tobytes()).hexdigest()[:12]}"
        self.idf = np.log((self.state[-1] + 2.0) / (self.state[:-1] + 1.0))
        self._vector = functools.lru_cache(self.CACHE)(self._vector)  # words repeat

    def fit(self, texts):
        """The same embedder with document frequencies: how many texts have each feature."""
        texts = [set(WORD.findall(text.casefold())) for text in texts]
        df = np.zeros(1 << 18)
        for word, count in Counter(word for text in texts for word in text).items():
            np.add.at(df, self._features(word) & len(df) - 1, count)
        # a text with two words of one feature counted twice, hence the cap
        state = np.append(np.minimum(df, len(texts)), len(texts)).astype("<u4")
        return HashEmbedder(self.dim, state)  # a new one: what this one embedded stays comparable

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
        """n texts -> (n, dim) float32 on the unit sphere."""
        out = np.zeros((len(texts), self.dim), np.float32)
        for x, text in zip(out, texts, strict=True):  # x (dim,): a row of out
            for word in WORD.findall(text.casefold()):
                x += self._vector(word)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)

class HuggingFaceEmbedder:
    """Any Hugging Face encoder: the normalised output feature of its first token, <cls> (3.1)."""

    state = np.zeros(0, "<u4")  # learns nothing

    def __init__(self, name):
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise ImportError(f"embedder hf:{name} needs: pip install transformers") from None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(name).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.name, self.dim = f"hf:{name}", self.model.config.hidden_size
        self.id = f"{self.name}:{self.dim}"

    def fit(self, texts):
        return self

    @torch.inference_mode()
    def encode(self, texts):
        """n texts -> (n, dim) float32 on the unit sphere."""
        out = np.zeros((len(texts), self.dim), np.float32)
        for i in range(0, len(texts), 64):
            batch = self.tokenizer(texts[i : i + 64], padding=True, truncation=True,
                                   return_tensors="pt").to(self.model.device)  # fmt: skip
            cls = self.model(**batch).last_hidden_state[:, 0].float()  # (64, dim)
            out[i : i + 64] = torch.nn.functional.normalize(cls, dim=-1).cpu().numpy()
        return out

def embedder(name, state=None):
    """The embedder called "hash", "hash:DIM", "hf:NAME" or "bge-m3" (the paper's), or ValueError.
    state: the .state of the same embedder after .fit, from disk. An object is returned as it is."""
    if not isinstance(name, str):
        return name
    name = {"hash": "hash:512", "bge-m3": "hf:BAAI/bge-m3"}.get(name, name)
    if name.startswith("hf:"):
        return HuggingFaceEmbedder(name[3:])
    if re.fullmatch(r"hash:[1-9]\d*", name):
        return HashEmbedder(int(name[5:]), state)
    raise ValueError(f"unknown embedder {name!r}: take hash, hash:DIM, bge-m3 or hf:NAME")

make_embedder = embedder  # for where an argument has the name

# -- The index --------------------------------------------------------------------------------

def _rebuild(path, embedder=None):
    """The cure of an index that is missing or wrong, as a command with its flags."""
    data, name = os.path.split(path)
    cure = f"make it anew with: python retrieval.py index --data {data} --references "
    return cure + name.removesuffix(".index") + (f" --embedder {embedder}" if embedder else "")

def choose_factory(n, dim):
    """The FAISS factory string for n vectors: exact to 100,000, then about 4 sqrt(n) lists.

    One thread, 120,000 x 512, chunks a second: Flat 1,100; IVF1024 with 8, 16, 32 lists searched
    5,200, 3,500, 2,100, where 0.983, 0.996, 0.998 of the chunks find their best reference.

    >>> choose_factory(20_000, 512), choose_factory(1_000_000, 512)
    ('IDMap2,Flat', 'IVF4096,Flat')
    """
    return "IDMap2,Flat" if n <= 100_000 else f"IVF{1 << round(np.log2(4 * n**0.5))},Flat"

class Retriever:
    """References that are found by text. On disk: index.faiss, embedder.npy, meta.json."""

    def __init__(self, path, index, embedder, tokenizer, meta):
        self.path, self.index, self.meta = path, index, meta
        self.embedder, self.tokenizer = embedder, tokenizer  # of the references and the queries

    def __len__(self):
        return self.index.ntotal

    @classmethod
    def build(cls, path, references, tokenizer_name, embedder="hash", factory=None, progress=True):
        """Indexes a corpus.References (id = row) and writes the directory `path`.

        embedder: a name or an object. factory: a FAISS factory string instead of our choice."""
        import faiss  # only where it is used: training on a GPU needs none of it

        n, tokenizer = len(references), corpus.tokenizer(tokenizer_name)
        texts = [tokenizer.decode(references[i]) for i in range(n)]
        model = make_embedder(embedder).fit(texts)
        factory = factory or choose_factory(n, model.dim)
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
        meta = dict(embedder=model.name, embedder_id=model.id, factory=factory)
        meta |= dict(tokenizer=str(tokenizer_name), tokenizer_id=tokenizer.id)
        retriever = cls(path, index, model, tokenizer, meta)
        retriever.save(references)
        return retriever

    @classmethod
    def open(cls, path, embedder=None, references=None):
        """Opens what save wrote. embedder: a name or an object, instead of the one of the index.

        references: the corpus.References that the ids are to name. FileNotFoundError without an
        index, ValueError if its parts, or it and the references, do not belong together."""
        import faiss

        if not os.path.exists(f"{path}/meta.json"):
            raise FileNotFoundError(f"{path}: no index here; {_rebuild(path)}")
        meta = json.loads(Path(f"{path}/meta.json").read_text())
        model = make_embedder(embedder or meta["embedder"], np.load(f"{path}/embedder.npy"))
        tokenizer = corpus.tokenizer(meta["tokenizer"])
        blob, wrong = np.fromfile(f"{path}/index.faiss", np.uint8), None
        if model.id != meta["embedder_id"]:
            wrong = f"has vectors of {meta['embedder_id']}, they do not compare with {model.id}'s"
        elif tokenizer.id != meta["tokenizer_id"]:
            wrong = f"was made with tokenizer {meta['tokenizer_id']}, not {tokenizer.id}"
        elif zlib.crc32(blob) != meta["crc"]:
            wrong = "is damaged or half renewed"
        elif references is not None and references.hash != meta["references"]:
            wrong = f"is stale: {references.path} has changed since"
        if wrong:
            raise ValueError(f"{path} {wrong}; {_rebuild(path, model.name)}")
        return cls(path, faiss.deserialize_index(blob), model, tokenizer, meta)

    def save(self, references=None):
        """Writes the index as it is now. references: what it stands for after live changes.

        meta.json comes last and has the checksum: what a kill leaves opens whole or not at all."""
        import faiss

        blob = faiss.serialize_index(self.index)
        self.meta |= dict(n=len(self), crc=zlib.crc32(blob))
        if references is not None:
            self.meta["references"] = references.hash
        os.makedirs(self.path, exist_ok=True)
        corpus.replace_file(f"{self.path}/embedder.npy", lambda f: np.save(f, self.embedder.state))
        corpus.replace_file(f"{self.path}/index.faiss", lambda f: f.write(blob))
        corpus.write_json(f"{self.path}/meta.json", self.meta)

    def search(self, queries, k):
        """The k references most similar to each query (cosine, sec. 3.1), best first.

        queries: n texts, or n token sequences: lists, or integers (n, m) with -1 = padding.
        Returns ids (n, k) int64 (-1: an inverted index found no more), scores (n, k) float32."""
        import faiss

        if not 1 <= k <= len(self):
            raise ValueError(f"k = {k} of N = {len(self)} references in {self.path}: need 1 to N")
        if isinstance(queries, str):
            raise ValueError("search takes a list of texts or token sequences, not one text")
        queries = queries.tolist() if hasattr(queries, "tolist") else queries
        texts = [q if isinstance(q, str) else self.tokenizer.decode(q) for q in queries]
        # FAISS takes BLAS from this many queries x dim on, by default 128,000. One thread, 20,000 x
        # 256, ms a query without and with: 1 query 1.7, 4.2; 4 queries 1.1, 0.5; 256: 1.1, 0.13.
        faiss.cvar.distance_compute_blas_threshold = 4 * self.embedder.dim
        scores, ids = self.index.search(self.embedder.encode(texts), k)
        return ids, scores

    def _has(self, i):
        try:
            return self.index.reconstruct(int(i)) is not None
        except RuntimeError:
            return False

    def add(self, ids, texts):
        """New references, found from now on. Like remove and replace, on disk only after save()."""
        if len({*ids}) < len(ids) or len(ids) != len(texts) or any(map(self._has, ids)):
            raise ValueError(f"add: one text for each id, and no id that is there already: {ids}")
        self.index.add_with_ids(self.embedder.encode(texts), np.array(ids, np.int64))

    def remove(self, ids):
        import faiss

        unknown = [i for i in ids if not self._has(i)]
        if unknown:
            raise ValueError(f"{self.path} has no references {unknown} to remove or replace")
        self.index.remove_ids(faiss.IDSelectorArray(np.array(ids, np.int64)))

    def replace(self, ids, texts):
        self.remove(ids)
        self.add(ids, texts)

# -- Neighbours for training (sec. 3.6) -------------------------------------------------------

def neighbors(tokens, chunk_len, references, retriever, k, *, threshold=0.9, context=2048,
              extra=3, start=0, stop=None):  # fmt: skip
    """The k best references of chunks start..stop that are no near-copies of their surroundings.

    tokens (n,): a split. Chunk c is tokens [cC, (c+1)C); its text is the query for k + extra
    references. Those that overlap the train sequence by more than the threshold (3.3) are dropped,
    for with the answer in memory nothing is learnt. Train sequence: the aligned window of `context`
    tokens around the chunk. Returns (stop - start, k) int32, best first, -1 = none."""
    if context % chunk_len:
        raise ValueError(f"--context {context}: give a multiple of chunk_len {chunk_len}")
    stop = min(len(tokens) // chunk_len, len(tokens) if stop is None else stop)
    chunks = np.asarray(tokens[start * chunk_len : stop * chunk_len]).reshape(-1, chunk_len)
    ids, _ = retriever.search(chunks, max(k, min(k + extra, len(retriever))))  # (n, k + extra)
    out = np.full((len(chunks), k), -1, np.int32)

    @functools.cache  # chunks of one sequence find the same references
    def copied(sequence, i):
        t = tokens[sequence * context : (sequence + 1) * context]
        return exceeds(t, references[i], threshold)

    for row, found in enumerate(ids.tolist()):
        sequence = (start + row) * chunk_len // context
        fit = (i for i in found if i >= 0 and not copied(sequence, i))
        for j, i in enumerate(islice(fit, k)):  # so only what is needed is looked at
            out[row, j] = i
    return out

def write_neighbors(path, tokens, chunk_len, references, retriever, k, *, threshold=0.9,
                    context=2048, batch=4096, progress=True):  # fmt: skip
    """Writes `neighbors` of a split: path (int32, (n_chunks, k)) and the same name in .json.

    After a kill it goes on where it stopped, unless something it depends on has changed."""
    if retriever.meta["references"] != references.hash:
        cure = _rebuild(retriever.path, retriever.embedder.name)
        raise ValueError(f"{retriever.path} is an index of other references; {cure}")
    n = len(tokens) // chunk_len
    if n == 0:
        raise ValueError(f"{path}: the split has no {chunk_len} tokens: give a smaller --chunk_len")
    meta = dict(chunk_len=chunk_len, k=k, n_chunks=n, n_tokens=len(tokens), threshold=threshold)
    meta |= dict(context=context, embedder=retriever.embedder.id, factory=retriever.meta["factory"])
    meta |= dict(references=references.hash, name=os.path.basename(references.path))
    meta["tokens"] = _digest(tokens)
    side, part, done = Path(path).with_suffix(".json"), Path(f"{path}.part"), 0
    if part.exists() and side.exists() and json.loads(side.read_text()) == meta:
        done = part.stat().st_size // (4 * k)  # whole rows of int32
    Path(path).unlink(missing_ok=True)  # until the end the sidecar speaks of the .part
    with part.open("ab") as f:
        f.truncate(4 * k * done)  # first: what another sidecar was for must not count as ours
        corpus.write_json(side, meta)
        for i in tqdm(range(done, n, batch), f"{batch} chunks", disable=not progress):
            f.write(neighbors(tokens, chunk_len, references, retriever, k, threshold=threshold,
                              context=context, start=i, stop=i + batch).tobytes())  # fmt: skip
            f.flush()
    part.replace(path)

def _digest(tokens):
    return hashlib.blake2b(np.ascontiguousarray(tokens)).hexdigest()[:16]

def open_neighbors(data, split, chunk_len=None):
    """The neighbours of a split in a data directory: (n_chunks, k) int32, and its references' name.

    Refused if the split, the references or the chunk_len are not those they were made for."""
    path = Path(f"{data}/{split}.neighbors.bin")
    side = path.with_suffix(".json")
    cure = f"make them with: python retrieval.py neighbors --data {data} --split {split}"
    if not (side.exists() and path.exists()):
        flags = f"--references NAME --chunk_len {chunk_len or 'C'} --context T"
        raise FileNotFoundError(f"{path}: no neighbours here; {cure} {flags}")
    meta = json.loads(side.read_text())
    now = dict(chunk_len=chunk_len or meta["chunk_len"])
    now["references"] = corpus.References.open(f"{data}/{meta['name']}").hash
    tokens = corpus.open_tokens(data, split)
    now |= dict(n_tokens=len(tokens), tokens=_digest(tokens))
    cure += f" --references {meta['name']} --chunk_len {now['chunk_len']}"
    cure += "".join(f" --{x} {meta[x]}" for x in ("context", "k", "threshold") if x in meta)
    for key, value in now.items():
        if meta.get(key, value) != value:
            raise ValueError(f"{path} is for {key} {meta[key]}, not {value}; {cure}")
    if path.stat().st_size != 4 * meta["n_chunks"] * meta["k"]:
        raise ValueError(f"{path} is cut off; {cure}")
    return np.memmap(path, np.int32, "r", shape=(meta["n_chunks"], meta["k"])), meta["name"]

# -- Command line -----------------------------------------------------------------------------

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
    args = parser.parse_args(argv)
    try:
        path = f"{args.data}/{args.references}.index"
        references = corpus.References.open(f"{args.data}/{args.references}")
        if args.command == "index" or not os.path.exists(f"{path}/meta.json"):
            made = Retriever.build(path, references, args.data, args.embedder, args.factory)
            print(f"{path}: {len(made):,} references, {made.embedder.id}, {made.meta['factory']}")
        if args.command == "neighbors":
            tokens = corpus.open_tokens(args.data, args.split)
            retriever = Retriever.open(path, references=references)
            path = f"{args.data}/{args.split}.neighbors.bin"
            write_neighbors(path, tokens, args.chunk_len, references, retriever, args.k,
                            threshold=args.threshold, context=args.context)  # fmt: skip
            rows, _ = open_neighbors(args.data, args.split)
            print(f"{path}: {len(rows):,} chunks x {args.k}, {(rows < 0).mean():.2%} empty")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"retrieval.py: {error}") from None

if __name__ == "__main__":
    main()
