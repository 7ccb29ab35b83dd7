"""The bank: the memories of a whole knowledge base, on disk (sec. 3.1, 3.3).

Fixed-size records with checksums, written before any question (warm start) or at the first
retrieval (cold start), and a cache in RAM. Shapes are named as at the top of model.py.
"""

import json
import math
import os
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import corpus
from common import UserError, check, write_json
from memory import Memories
from quantize import Codec

FORMAT = ["memory3 bank", 2]  # and its version
DELETED = 255  # in count.bin
THREADS = 8  # an SSD answers many reads at a time
WINDOW = 64 << 20  # bytes that are read at a time where the whole bank is


class MemoryBank:
    """The memories of a whole knowledge base, on disk: row i is that of reference i (sec. 3.1).

        meta.json       shape, dtype, codec, references, and whose memories these are
        memories.bin    n records of one size, (Lm, 2, Hkv, S, dh) numbers or (Lm, 2, Hkv, S) codes
        count.bin       uint8 each: filled slots; 255 = deleted
        crc.bin         uint32 each: checksum of the record and its count; 0 = not written
        codec.*         where quantized (sec. 3.3)

    A record is on disk before its checksum is, so a writer may die at any moment: what it left half
    done counts as missing. With a model, `write` makes all missing records (warm start), `recall`
    those that it needs (cold start); without one the bank is read-only. Only the model that wrote
    memories can read them (Remark A.1): meta.json has its fingerprint. One process writes at once,
    and one thread recalls.

        bank = MemoryBank.create("out/kb.bank", model, corpus.References.open("data/cities/kb"))
        bank.write()
        logits, _ = model(tokens, None, bank.recall([17, 4, 17]), recall)   # a pool of 3
    """

    def __init__(self, path, meta, references, model, codec, cache):
        self.path, self.meta, self.references, self.model = path, meta, references, model
        self.shape, self.dtype = tuple(meta["shape"]), getattr(torch, meta["dtype"])
        self.record_bytes = meta["record_bytes"]
        self.vector = self.record_bytes // math.prod(self.shape[:-1])  # bytes of a key, of a value
        self.window = max(1, WINDOW // self.record_bytes)
        self.device = model.device if model else torch.device("cpu")
        self.codec = codec and codec.to(self.device)
        self.cache, self.cache_size = {}, cache  # id -> its record, last used last
        self.hits = self.misses = self.encoded = 0
        self.file = open(path / "memories.bin", "r+b" if model else "rb", buffering=0)
        self.threads, self.room = ThreadPoolExecutor(THREADS), ()
        self._map()

    def _map(self):
        mode, n = "r+" if self.model else "r", len(self.references)
        self.count = np.memmap(self.path / "count.bin", np.uint8, mode, shape=n)
        self.crc = np.memmap(self.path / "crc.bin", np.dtype("<u4"), mode, shape=n)

    def __len__(self):
        return len(self.references)

    @staticmethod
    def create(path, model, references, dtype="bfloat16", codec=None):
        """An empty bank for the memories of corpus.References, or the bank that is there already.
        dtype: bfloat16 or float32. codec: a quantize.Codec; the records are then its codes.
        ValueError where `path` holds something else, or a reference is longer than ref_len."""
        path, c, longest = Path(path), model.config, int(np.diff(references.offsets).max())
        check(dtype in ("bfloat16", "float32"), f"dtype {dtype}: a bank is in bfloat16 or float32")
        fits = longest <= c.ref_len and references.n_vocab <= c.vocab_size
        has = f"{references.path}: {longest} tokens, vocabulary of {references.n_vocab}"
        check(fits, f"{has}; the model takes ref_len {c.ref_len} and {c.vocab_size}")
        if not (path / "meta.json").exists():
            ours = {*files(0), "meta.json.tmp", "codec.faiss", "codec.npz", "codec.new"}
            free = not path.exists() or path.is_dir() and {f.name for f in path.iterdir()} <= ours
            check(free, f"{path} holds something else than a bank: give another path")
            path.mkdir(parents=True, exist_ok=True)
            if codec:
                codec.save(path)
            vector = codec.bytes if codec else c.head_dim * getattr(torch, dtype).itemsize
            record_bytes = math.prod(c.memory_shape[:-1]) * vector
            for file, size in files(record_bytes).items():
                with open(path / file, "wb") as f:
                    f.truncate(len(references) * size)  # sparse: takes no room until written
            meta = dict(
                format=FORMAT,
                shape=c.memory_shape,
                dtype=dtype,
                codec=codec_name(codec),
                record_bytes=record_bytes,
                n=len(references),
                references=str(references.path),
                references_hash=[references.hash],
                fingerprint=model.fingerprint(),
                tokenizer=corpus.manifest(Path(references.path).parent).get("tokenizer_id"),
            )
            write_json(path / "meta.json", meta)  # the last: without it there is no bank
        bank = MemoryBank.open(path, model, references)
        has, wanted = bank.meta["codec"] or bank.meta["dtype"], codec_name(codec) or dtype
        check(has == wanted, f"{path} is a bank of {has}, not of {wanted}: give another")
        return bank

    @staticmethod
    def open(path, model=None, references=None, cache=1024):
        """The bank at `path`. model: its writer, None: read-only. references: those it was made of,
        None: from their file. cache: memories that are kept in RAM.
        UserError, one line with the cure, for what must not be read."""
        path, anew = Path(path), "remove the bank and run write.py again"
        file, cure = path / "meta.json", f"first python write.py --out {path}"
        check(file.exists(), f"{file} is missing: {cure}")
        try:
            meta = json.loads(file.read_text())
            known = meta["format"] == FORMAT
        except (ValueError, KeyError, TypeError):
            known = False
        line = f"{file} is not of a memory bank of version {FORMAT[1]}: give another path"
        check(known, f"{line}, or remove an older bank")
        references = references or corpus.References.open(meta["references"])
        now, then, writer = references.hash, meta["references_hash"], meta["fingerprint"]
        line = f"{references.path} is not the text that {path} was written from"
        check(now in then, f"{line}: bring that back, or {anew}")
        reader = model.fingerprint() if model else writer
        line = f"{path} is of model {writer}: {reader} cannot read those memories (Remark A.1)"
        check(reader == writer, f"{line}; {anew}")
        for name, row in files(meta["record_bytes"]).items():
            whole = (path / name).exists() and (path / name).stat().st_size >= len(references) * row
            check(whole, f"{path / name} is missing or cut off: copy it again, or {anew}")
        codec = Codec.load(path) if meta["codec"] else None
        check(codec_name(codec) == meta["codec"], f"{path} is not of its codec.npz: {anew}")
        bank = MemoryBank(path, meta, references, model, codec, cache)
        if model and then != [now]:  # a live change was cut short: before it or after it, now known
            bank._save(n=len(bank), references_hash=[now])
        return bank

    def _save(self, **changes):
        self.meta |= changes
        write_json(self.path / "meta.json", self.meta)

    def recall(self, ids, decode=True):
        """The memories of references `ids` (1-D, any order, repeats allowed), as a pool.
        Row m is that of ids[m], on the model's device, in the dtype of the bank (float32 from
        codes; with decode=False the codes). What the cache in RAM (sec. 3.1) lacks is read, once.
        UserError for ids that are deleted or out of range or, without a model, missing."""
        ids = torch.as_tensor(ids).cpu().numpy()
        row = ids.ndim == 1 and (not ids.size or ids.dtype.kind in "iu")
        check(row, f"recall takes a row of integers, not {ids.dtype} of {ids.shape}")
        ids, order = np.unique(ids.astype(np.int64), return_inverse=True)
        self._check(*ids[:1], *ids[-1:])
        for i in ids[self._deleted(ids)]:
            raise UserError(f"{self.path}: {i} was deleted; take it out of the index, too")
        buffer, new = self._buffer(len(ids)), []
        rows = buffer.numpy()
        for j, i in enumerate(ids.tolist()):
            if i in self.cache:
                rows[j] = self.cache[i] = self.cache.pop(i)
            else:
                new.append(j)
        self.hits, self.misses = self.hits + len(ids) - len(new), self.misses + len(new)
        while not (good := self._read(ids[new], [rows[j] for j in new])).all():
            bad = ids[new][~good]
            self._need_model(f"the memory of reference {bad[0]} is missing or damaged")
            if not self.encoded:
                print(f"{self.path}: cold start, memories are encoded at their first retrieval")
            self.encoded += len(bad)
            self._fill(bad)
        for j in new if self.cache_size else []:
            self.cache[int(ids[j])] = rows[j].copy()
            if len(self.cache) > self.cache_size:
                del self.cache[next(iter(self.cache))]  # the least recently used
        kv = buffer.to(self.device, non_blocking=True).view(-1, *self.shape[:-1], self.vector)
        if not self.codec:
            kv = kv.view(self.dtype)  # (n, Lm, 2, Hkv, S, dh)
        elif decode:  # only the codes crossed the bus
            kv = self.codec.decode(kv)
        pool = Memories(kv, torch.from_numpy(self.count[ids].astype(np.int64)).to(self.device))
        same = np.array_equal(order, np.arange(len(ids)))  # as asked for: no copy
        return pool if same else pool[torch.from_numpy(order).to(self.device)]

    def _buffer(self, n):
        """Room for n records, used again each time: new pages take longer to get than to read full.
        On CUDA it is pinned, so that the GPU copies by itself; PyTorch gives it out again later."""
        if self.device.type == "cuda":
            return torch.empty((n, self.record_bytes), dtype=torch.uint8, pin_memory=True)
        if n > len(self.room) or sys.getrefcount(self.room) > 2:  # a pool is still made of it
            self.room = np.empty((n, self.record_bytes), np.uint8)
        return torch.from_numpy(self.room[:n])

    def _read(self, ids, rows):
        """Records -> rows (n, record_bytes) uint8, and good (n,): whose checksum fits. It is found
        while the record is in the processor's cache. (A memmap would wait fault by fault.)"""
        count, crc, good = self.count[ids], self.crc[ids], np.zeros(len(ids), bool)

        def read(share):
            for j in share:
                if crc[j]:  # else nothing was written
                    os.preadv(self.file.fileno(), [rows[j]], int(ids[j]) * self.record_bytes)
                    good[j] = checksum(rows[j], count[j]) == crc[j]

        list(self.threads.map(read, np.array_split(np.arange(len(ids)), THREADS)))  # list: raises
        return good & (crc == self.crc[ids])  # nor did another process begin to change it

    def _deleted(self, ids):
        return (self.count[ids] == DELETED) & (self.crc[ids] == 0)

    def _check(self, *ids):
        for i in ids:
            check(
                0 <= i < len(self), f"{self.path} has references 0 to {len(self) - 1}, and no {i}"
            )

    def live(self):
        """The ids that are not deleted (n,)."""
        return np.flatnonzero(~self._deleted(slice(None)))

    def _windows(self):
        live = self.live()
        return np.split(live, range(self.window, len(live), self.window))

    def verify(self):
        """The ids whose record is missing or damaged. Reads the whole bank; changes nothing."""
        rows = np.empty((self.window, self.record_bytes), np.uint8)
        bad = [ids[~self._read(ids, rows)] for ids in self._windows()]
        return np.concatenate(bad).tolist()

    def stats(self):
        """One line about the cache."""
        counts = f"{self.hits:,} hits, {self.misses:,} misses, {self.encoded:,} of them encoded at"
        return f"cache of {self.cache_size:,} memories: {counts} their first retrieval"

    def write(self, batch=64, progress=True):
        """Warm start: writes every memory that is missing or damaged, and returns how many there
        were. Stopped at any moment and called again, it goes on where it was."""
        self._need_model()
        todo, n = self.verify(), len(self.live())
        with tqdm(total=n, initial=n - len(todo), unit=" memories", disable=not progress) as bar:
            self._fill(np.array(todo, int), batch, bar.update)
        return len(todo)

    def _fill(self, ids, batch=64, done=lambda n: None):
        """Encodes references in batches of ONE length, the longest first: beside padding, sums come
        in another order, and rounding decides which of two equal words is kept. So a reference
        gives the same bytes in any batch (measured on a CPU); else a quarter differ."""
        length = self.references.offsets[ids + 1] - self.references.offsets[ids]
        for n in np.unique(length)[::-1]:
            same = ids[length == n]
            for part in np.split(same, range(batch, len(same), batch)):
                with torch.inference_mode():
                    made = self.model.write(self.references.batch(part))
                    kv = made.kv.to("cpu", self.dtype)
                self._put(part, self.codec.encode(kv) if self.codec else kv, made.count)
                done(len(part))

    def _put(self, ids, kv, count):
        """Records of `ids`: first the bytes, then the count, then what vouches for them."""
        rows = kv.contiguous().view(torch.uint8).view(len(ids), -1).numpy()  # (n, record_bytes)
        for i, row, n in zip(ids.tolist(), rows, count.tolist(), strict=True):
            size = os.pwrite(self.file.fileno(), row, i * self.record_bytes)
            check(size == len(row), f"{self.path}/memories.bin: the disk is full")
            self.count[i] = n
            self.crc[i] = checksum(row, n)

    def _need_model(self, why="it is open for reading only"):
        check(self.model, f"{self.path}: {why}; open it with its model")

    def append(self, tokens):
        """Adds a reference (1 to ref_len token ids, without header) and its memory; its id."""
        return self.replace(len(self), tokens)

    def replace(self, i, tokens):
        """Gives reference i another text and, with it, memory (i = N: a new one; deleted: revived).
        While the text changes, meta.json names it as it was and as it will be, and no checksum
        vouches for row i: a kill leaves one of the two texts, its memory missing or right."""
        self._need_model()
        if i != len(self):
            self._check(i)
        most, v = self.model.config.ref_len, self.references.n_vocab
        tokens = np.atleast_1d(tokens).tolist()
        fits = 1 <= len(tokens) <= most and all(t in range(v) for t in tokens)
        check(fits, f"a reference is 1 to {most} tokens (ref_len), each 0 to {v - 1}")
        rows = [*self.references]
        rows[i : i + 1] = [tokens]
        text = np.concatenate(rows).astype(self.references.tokens.dtype)
        after = corpus.References(None, text, np.cumsum([0, *map(len, rows)]), v).hash
        self._save(references_hash=[self.references.hash, after])
        for name, size in files(self.record_bytes).items():
            os.truncate(self.path / name, max(len(self), i + 1) * size)
        self.crc[i : i + 1] = 0  # a new row has 0 already
        self.crc.flush()
        self.references.replace(i, tokens)
        self._map()
        self.cache.pop(i, None)
        self._fill(np.array([i]))
        self._save(n=len(self), references_hash=[after])
        return i

    def delete(self, i):
        """Forgets the memory of reference i: its numbers leave the disk, recalling it is an error.
        The row stays, and the text in the references' file, so that all other ids stay as well."""
        self._need_model()
        self._check(i)
        self.crc[i] = 0  # from here on missing, from the last line on deleted
        self.cache.pop(i, None)
        os.pwrite(self.file.fileno(), bytes(self.record_bytes), i * self.record_bytes)
        self.count[i] = DELETED

    def quantize(self, path, spec=None, progress=True):
        """Writes the same memories as codes (sec. 3.3) into another directory; returns that bank.
        The codec, of `spec` (None: chosen by size), is trained on vectors uniform over the filled
        slots of references drawn uniformly (App. B): 65,536, or 640,000 for the paper's own."""
        path, new, another = Path(path), Path(f"{path}.new"), "give another directory"
        check(not self.codec, f"{self.path} is quantized already: {another}")
        check(not path.exists(), f"{path} exists: {another}")
        self._need_model()  # recall makes what is missing
        rng = np.random.default_rng(0)
        some = self.recall(rng.permutation(self.live())[: 4 * self.window])
        filled = torch.arange(self.shape[3], device=self.device) < some.count[:, None]
        vectors = some.kv.transpose(1, 4)[filled].flatten(0, -2)  # (slots * 2 * Hkv * Lm, dh)
        sample = 65_536 if self.shape[4] < 64 else 640_000  # see quantize.default_spec
        codec = Codec.train(vectors[rng.permutation(len(vectors))[:sample]], spec)
        shutil.rmtree(new, ignore_errors=True)  # what a kill left of an earlier try
        bank = MemoryBank.create(new, self.model, self.references, self.meta["dtype"], codec)
        bank.count[:] = DELETED  # those that get no codes stay so
        for ids in tqdm(self._windows(), "quantizing", disable=not progress):
            pool = self.recall(ids)
            bank._put(ids, codec.encode(pool.kv), pool.count)
        os.rename(new, path)
        return MemoryBank.open(path, self.model, self.references)


def files(record_bytes):  # that have a row a reference, and the bytes of a row
    return {"memories.bin": record_bytes, "count.bin": 1, "crc.bin": 4}


COLUMNS = 1021  # a prime: pages that change places fall into other columns
POWERS = np.cumprod(np.full(2 * COLUMNS, 0x9E3779B97F4A7C15, np.uint64))  # odd: none vanishes


def checksum(record, count):
    """32 bits that vouch for a record (bytes,) uint8 and its count; never 0. Its 64-bit words are
    added up in columns, and these and what is left over are weighed by powers of one number, modulo
    2^64. Like a CRC-32 it misses one damage in 2^32, but it takes less time than to read."""
    words = record.view(f"<u{math.gcd(len(record), 8)}")
    whole = len(words) // COLUMNS * COLUMNS
    columns = np.add.reduce(words[:whole].reshape(-1, COLUMNS), 0, np.uint64)
    terms = np.concatenate([np.array([count], np.uint64), columns, words[whole:]])
    total = int(terms @ POWERS[: len(terms)])
    return max(1, (total ^ total >> 32) & 0xFFFFFFFF)


def codec_name(codec):
    return codec and f"{codec.spec}:{zlib.crc32(codec.table.cpu().numpy()):08x}"
