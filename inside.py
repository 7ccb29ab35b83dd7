"""Retrieval from inside (Remark 3.1): the model's own queries search its own memories.

The vectors of a reference are the kept keys of one key-value head, exactly as its memory holds
them, after RoPE. A query text is read like a context, behind the header. Of its tokens, those that
a memory would keep search with their queries of the same head. No encoder, no training.

    score(text, reference) = mean over the chosen tokens i of max over the kept tokens j of
                             cos(q_i, k_j)                   [MaxSim, as ColBERT's late interaction]

Not here: finding references by their text (retrieval.py).
"""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import corpus
import index as vectors_index
from common import (
    check,
    checksum,
    make_directory,
    optional,
    read_array,
    read_sealed,
    replace_file,
    write_sealed,
)
from index import NOTHING, cure_for
from memory import causal_attention, keep_tokens
from model import apply_rope, rope_table

FORMAT = "memory3 keys 1"
META = dict(
    format=str,
    embedder=str,  # self:LAYER.HEAD
    embedder_id=str,  # self:LAYER.HEAD:fingerprint of the model
    tokenizer_id=str,
    references=str,  # their hash
    checksum=int,  # of index.faiss
)
BATCH = 64  # references, or queries, that the model reads at a time
FETCH = 100  # keys that each query vector fetches: their references are then scored exactly


def parse_head(name, config):
    """ "self:LAYER.HEAD" -> the index of the memory layer, the key-value head. UserError for a head
    that keeps no memories."""
    match = re.fullmatch(r"self:([0-9]{1,4})\.([0-9]{1,4})", name)
    check(match, f"unknown embedder {name!r}: give self:LAYER.HEAD, as self:2.1")
    layer = int(match[1])
    head = int(match[2])
    layers = config.memory_layers
    valid = layer in layers and head < config.n_kv_head
    last = config.n_kv_head - 1
    line = f"--embedder {name}: memories are kept in layers {layers[0]} to {layers[-1]}"
    check(valid, f"{line}, heads 0 to {last}")
    i = layers.index(layer)
    kept = config.kept_heads is None or (i, head) in config.kept_heads
    check(kept, f"--embedder {name}: this model keeps no memories there ({config.memory_heads})")
    return i, head


@torch.inference_mode()
def query_vectors(model, texts, i, head):
    """The vectors by which token sequences (without BOS) search for memories: for each an array
    (m, dh) of unit vectors. They are the queries of all query heads that share key-value head
    `head` of memory layer i, at the tokens that a memory would keep. A text without tokens has
    none."""
    cfg = model.config
    layer = cfg.memory_layers[i]
    group = cfg.n_head // cfg.n_kv_head
    lengths = torch.tensor([len(text) for text in texts])  # (B,)
    n = int(lengths.max())
    context = torch.zeros((len(texts), 1 + n), dtype=torch.int64)  # padded on the right
    context[:, 0] = cfg.header[0]  # the BOS
    for row, text in zip(context, texts, strict=True):
        row[1 : 1 + len(text)] = torch.as_tensor(text, dtype=torch.int64)
    mask = (torch.arange(n) < lengths[:, None]).to(model.device)  # (B, n): True = real token
    n_header = len(cfg.header)
    first = n_header + 1  # of the text
    header = torch.tensor(cfg.header).expand(len(texts), -1)  # (B, P)
    tokens = torch.cat([header, context], 1).to(model.device)  # (B, P+1+n)
    at = torch.arange(tokens.shape[1], device=model.device)
    at = torch.where(at < n_header, at, at + cfg.ref_len)  # where a context stands (sec. 3.2)
    cos, sin = rope_table(at, cfg)  # (P+1+n, dh)

    def attend(l, q, k, v):
        """Below `layer` a plain decoder; there its queries, and which tokens it would keep."""
        turned_q = apply_rope(q, cos, sin)  # (B, H, P+1+n, dh)
        turned_k = apply_rope(k, cos, sin)  # (B, Hkv, P+1+n, dh)
        if l < layer:
            return causal_attention(turned_q, turned_k, v), None
        # tokens are chosen before RoPE, as those of a reference are; the search is after it, as
        # reading is
        own_q = q[:, :, first:]  # (B, H, n, dh)
        own_k = k[:, :, first:]  # (B, Hkv, n, dh)
        size = cfg.memory_tokens
        approximate = cfg.approximate_weights
        chosen = keep_tokens(own_q, own_k, mask, size, approximate, cfg.selection)  # (B, Hkv, S)
        heads = slice(head * group, (head + 1) * group)
        queries = turned_q[:, heads, first:]  # (B, G, n, dh)
        return None, (queries, chosen[:, head])

    x = model.embed(tokens)  # (B, P+1+n, d)
    for l in range(layer + 1):
        x, made = model._layer(l, x, attend)
    queries, chosen = made  # (B, G, n, dh), (B, S)
    queries = F.normalize(queries.float(), dim=-1).cpu()
    found = []
    for row, places in zip(queries, chosen.cpu(), strict=True):
        places = places[places >= 0]  # (m,)
        found.append(row[:, places].flatten(0, 1).numpy())  # (G * m, dh)
    return found


@torch.inference_mode()
def written_keys(model, references, i, head):
    """The keys of references (token ids), as their memories would hold them: for each an array
    (count, dh) of unit vectors."""
    longest = max(len(reference) for reference in references)
    tokens = torch.full((len(references), longest), -1)  # (N, n)
    for row, reference in zip(tokens, references, strict=True):
        row[: len(reference)] = torch.as_tensor(reference)
    return stored_keys(model.write(tokens), i, head)


def stored_keys(memories, i, head):
    """The keys in these memories: for each an array (count, dh) of unit vectors."""
    kept = memories.kv[:, i, 0, head].detach().float()  # (N, S, dh)
    keys = F.normalize(kept, dim=-1).cpu().numpy()  # (N, S, dh)
    return [row[:n] for row, n in zip(keys, memories.count.tolist(), strict=True)]


class KeyRetriever:
    """Finds references by the keys of one head; .search is that of retrieval.Retriever.

        index.faiss   the keys, one after the other
        rows.npy      (n, 3): id of a reference, the first of its rows, how many
        meta.json     whose keys these are

    A change appends rows and forgets rows; save() writes everything. What is forgotten is no longer
    found, but its keys stay in index.faiss until the index is made anew.
    """

    def __init__(self, path, index, rows, model, tokenizer, meta):
        self.path = path
        self.index = index  # a faiss.Index of unit vectors (dh,)
        self.rows = rows  # id -> (first, count)
        self.model = model
        self.tokenizer = tokenizer
        self.meta = meta
        self.embedder = Named(meta["embedder"], meta["embedder_id"], model.config.head_dim)
        self.i, self.head = parse_head(meta["embedder"], model.config)
        self.version = 0  # of changes: here they are in the index itself
        self.n_changes = meta.get("n_changes", 0)  # references added or forgotten since it was made
        self._find_owners()

    def _find_owners(self):
        """owner (all rows,): the reference whose key a row is, -1 = forgotten."""
        self.owner = np.full(self.index.ntotal, -1, np.int64)
        for i, (first, count) in self.rows.items():
            self.owner[first : first + count] = i

    def __len__(self):
        return len(self.rows)

    @staticmethod
    def make(path, model, name, tokenizer, references_hash, n, keys):
        """keys: an iterator over n (id, (count, dh)); in memory only, until save()."""
        parse_head(name, model.config)
        dim = model.config.head_dim
        n_keys = n * model.config.memory_tokens
        # keys are short: compare exactly up to as many numbers as FLAT vectors of 512 have
        n_like = n_keys * dim // 512
        factory = "Flat"
        if n_like > vectors_index.FLAT:
            factory = vectors_index.choose_factory(n_keys, dim)
        index = vectors_index.empty_index(factory, dim)
        arrays = []
        rows = {}  # id -> (first row, how many)
        first = 0
        for id, array in keys:
            rows[id] = (first, len(array))
            first += len(array)
            arrays.append(array)
        nothing = np.zeros((0, dim), np.float32)  # so that an index may have no references
        stacked = np.concatenate([*arrays, nothing])  # (all keys, dh)
        if not index.is_trained:
            index.train(stacked[:: max(1, len(stacked) // 262_144)])
        index.add(stacked)
        make_reconstructible(index)
        meta = dict(
            format=FORMAT,
            embedder=name,
            embedder_id=f"{name}:{model.fingerprint()}",
            tokenizer_id=tokenizer.id,
            references=references_hash,
        )
        return KeyRetriever(path, index, rows, model, tokenizer, meta)

    @staticmethod
    def build(path, references, tokenizer_name, name, model, bank=None, progress=True):
        """Indexes the memories of references, and writes the directory `path`. bank: the MemoryBank
        that has them; None: they are written once more, for their keys alone."""
        check(
            model is not None,
            f"--embedder {name} needs the model whose keys to index: give --checkpoint",
        )
        i, head = parse_head(name, model.config)
        n = len(references)

        def keys():
            """Yields (id, keys (count, dh)) of all references that are not deleted."""
            for start in tqdm(range(0, n, BATCH), "reading keys", disable=not progress):
                ids = [id for id in range(start, min(start + BATCH, n)) if len(references[id])]
                if not ids:
                    continue
                if bank is None:
                    found = written_keys(model, [references[id] for id in ids], i, head)
                else:
                    found = stored_keys(bank.recall(ids), i, head)
                yield from zip(ids, found, strict=True)

        tokenizer = corpus.tokenizer(tokenizer_name)
        made = KeyRetriever.make(path, model, name, tokenizer, references.hash, n, keys())
        return made.save(references)

    @staticmethod
    def open(path, model, tokenizer_name=None, references=None):
        """Opens what save wrote. UserError without the model whose keys they are (Remark A.1)."""
        path = Path(path)
        cure = cure_for(path)
        meta = read_sealed(path / "meta.json", META, cure)
        cure = cure_for(path, meta["embedder"])
        check(meta["format"] == FORMAT, f"{path} is a {meta['format']}, not {FORMAT}; {cure}")
        check(
            model is not None, f"{path} is searched by the model that wrote it: give --checkpoint"
        )
        converted = f"{meta['embedder']}:{model.fingerprint()}"
        line = f"{path} has keys of {meta['embedder_id']}, and this model is {converted}; {cure}"
        check(meta["embedder_id"] == converted, line)
        tokenizer = corpus.tokenizer(tokenizer_name or path.parent)
        line = f"{path}: tokenizer {meta['tokenizer_id']} and {tokenizer.id} do not compare; {cure}"
        check(meta["tokenizer_id"] == tokenizer.id, line)
        valid = references is None or references.hash == meta["references"]
        check(valid, f"{path} is stale: its references have changed since; {cure}")
        rows = read_array(path / "rows.npy", "<i8", (None, 3), cure)
        sizes = dict(n=meta.get("n"), dim=model.config.head_dim, checksum=meta["checksum"])
        index = vectors_index.open_index(path / "index.faiss", sizes, cure)
        valid = len(rows) == 0 or (
            rows.min() >= 0 and (rows[:, 1] + rows[:, 2]).max() <= sizes["n"]
        )
        check(valid, f"{path}/rows.npy is damaged; {cure}")
        make_reconstructible(index)
        table = {int(i): (int(first), int(count)) for i, first, count in rows}
        return KeyRetriever(path, index, table, model, tokenizer, meta)

    def save(self, references=None):
        """Writes everything. references: the references as they are after the changes."""
        faiss = optional("faiss")
        path = Path(self.path)
        make_directory(path)
        if references is not None:
            self.meta["references"] = references.hash
        file = path / "index.faiss"
        made = path / "index.faiss.tmp"
        faiss.write_index(self.index, str(made))
        self.meta["checksum"] = checksum(made)
        self.meta["n"] = self.index.ntotal
        self.meta["n_changes"] = self.n_changes
        made.replace(file)
        rows = [(i, first, count) for i, (first, count) in self.rows.items()]
        table = np.array(rows, "<i8").reshape(-1, 3)
        replace_file(path / "rows.npy", lambda f: np.save(f, table))
        write_sealed(path / "meta.json", self.meta)  # the last: its checksum vouches for the index
        return self

    def search(self, queries, k):
        """The k references whose keys answer each query best: see retrieval.Retriever.search."""
        check(k >= 1, f"{self.path}: {k} references asked for; ask for 1 or more")
        check(not isinstance(queries, str), "search takes a list of texts, not one text")
        texts = [self._tokens(query) for query in queries]
        ids = np.full((len(texts), k), -1, np.int64)
        scores = np.full((len(texts), k), NOTHING, np.float32)
        asked = [row for row, text in enumerate(texts) if len(text)]  # the others find nothing
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            batch = [texts[row] for row in part]
            searching = query_vectors(self.model, batch, self.i, self.head)
            for row, vectors in zip(part, searching, strict=True):  # vectors (m, dh)
                found, similarities = self._search_one(vectors, k)
                ids[row, : len(found)] = found
                scores[row, : len(found)] = similarities
        return ids, scores

    def _tokens(self, query):
        """A query's token ids, without BOS and padding, the last max_context - 1 of them."""
        if isinstance(query, str):
            query = self.tokenizer.encode(query)
        kept = [int(t) for t in query if t >= 0 and t != self.model.config.header[0]]
        return kept[1 - self.model.config.max_context :]

    def _search_one(self, vectors, k):
        """vectors (m, dh) -> the ids and scores of at most k references, best first."""
        # Only references with a key near one of the vectors are scored ...
        rows, _ = vectors_index.search(self.index, vectors, FETCH)  # (m, FETCH)
        owners = self.owner[rows[rows >= 0]]
        candidates = np.unique(owners[owners >= 0])  # (c,)
        if len(candidates) == 0:
            return candidates, np.zeros(0, np.float32)
        # ... and by all of their keys
        places = []
        starts = []  # of each candidate's keys
        n_keys = 0
        for i in candidates.tolist():
            first, count = self.rows[i]
            places.append(np.arange(first, first + count))
            starts.append(n_keys)
            n_keys += count
        keys = self.index.reconstruct_batch(np.concatenate(places))  # (n_keys, dh)
        cosines = vectors @ keys.T  # (m, n_keys)
        best = np.maximum.reduceat(cosines, starts, axis=1)  # (m, c): the max over each one's keys
        scores = best.mean(0)  # (c,)
        order = np.argsort(-scores, kind="stable")[:k]  # of equal scores the lower id
        order = order[scores[order] > 0]
        return candidates[order], scores[order]

    # -- Live changes

    def add(self, ids, texts):
        there = [i for i in ids if int(i) in self.rows]
        check(not there, f"{self.path}: references {there} are there already: replace them")
        self._check_pairs(ids, texts)
        self.update(ids, texts)

    def remove(self, ids):
        unknown = [i for i in ids if int(i) not in self.rows]
        check(not unknown, f"{self.path} has no references {unknown} to remove or replace")
        self._check_pairs(ids, ids)
        for i in ids:
            self._forget(int(i))

    def replace(self, ids, texts):
        unknown = [i for i in ids if int(i) not in self.rows]
        check(not unknown, f"{self.path} has no references {unknown} to remove or replace")
        self.update(ids, texts)

    def update(self, ids, texts):
        """Gives references these texts, or token ids, whether they are there or not; an empty one
        is forgotten."""
        self._check_pairs(ids, texts)
        for i, text in zip(ids, texts, strict=True):
            self._forget(int(i))
            tokens = self.tokenizer.encode(text) if isinstance(text, str) else text
            tokens = tokens[: self.model.config.ref_len]
            if len(tokens):
                keys = written_keys(self.model, [tokens], self.i, self.head)[0]
                self.rows[int(i)] = (self.index.ntotal, len(keys))
                self.index.add(keys)
                self.owner = np.append(self.owner, np.full(len(keys), int(i)))
                self.n_changes += 1

    def _check_pairs(self, ids, texts):
        check(len(set(ids)) == len(ids) == len(texts), f"give one text for each id: {list(ids)}")

    def _forget(self, i):
        if i in self.rows:
            first, count = self.rows.pop(i)
            self.owner[first : first + count] = -1
            self.n_changes += 1


class Named:
    """The name, id and dim of an embedder: see embed.py."""

    def __init__(self, name, id, dim):
        self.name = name
        self.id = id
        self.dim = dim


def make_reconstructible(index):
    """Lets an inverted file give its vectors back by their row."""
    if vectors_index.n_lists(index):
        vectors_index.inner_index(index).make_direct_map()
