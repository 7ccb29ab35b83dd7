"""The bank: a knowledge base on disk, its texts and their explicit memories (sec. 3.1, 3.3).

A knowledge base is one directory:

    texts.sqlite      the truth: each reference's tokens, its source, and when it last changed
    memories.bin      their memories, records of one size; record i is that of reference i
    codes/            the same in fewer bytes (sec. 3.3), if write.py --quantize made them
    index/            what finds references by text (retrieval.py)
    meta.json, tokenizer.json     the tokenizer of the texts
    relevance.json    when nothing is known, if kb.py calibrate has learnt it
    lock              held by whoever makes an index

All transactions and locks are SQLite's. Everything but the texts is derived from them, and each
record vouches for what it is: its checksum covers its numbers, the text it was made from and the
model that wrote it. A record that does not fit counts as missing; missing records are encoded at
their first retrieval (cold start) or by `write` (warm start). Shapes are named as in model.py.

Not here: finding references (retrieval.py) and words (corpus.py); a text is a row of token ids.
"""

import hashlib
import json
import math
import operator
import os
import shlex
import sqlite3
import struct
import sys
import threading
import uuid
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import corpus
from common import UserError, check, command, lock, make_directory, write_json
from memory import Memories, pack_heads, unpack_heads
from quantize import Codec

FORMAT = ["memory3 knowledge base", 3]  # and its version
WAIT = 30  # seconds to wait for another process that is changing the same base
THREADS = 8  # an SSD answers many reads at a time
WINDOW = 64 << 20  # bytes to read at a time when the whole bank is read
# the cure where texts.sqlite is damaged
RESTORE = "bring it back from a copy, or save what is whole with the sqlite3 command .recover"
RESTORE += "; after either make its index anew (kb.py index)"

# The threads of OpenMP do not survive a fork: with more than one a child would wait for ever.
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


# -- The texts ---------------------------------------------------------------------------------

# The only row of `base` says what this base is; seal is its checksum.
BASE = "CREATE TABLE base (meta TEXT, seal INTEGER)"
TEXTS = """CREATE TABLE texts (
    id      INTEGER PRIMARY KEY,  -- 0, 1, 2, ...: never given twice
    version INTEGER,              -- number of the transaction that changed this row last
    live    INTEGER,              -- 0: deleted; its tokens and its source are gone then
    hash    INTEGER,              -- of the tokens: finds exact copies
    tokens  BLOB,                 -- uint16 (uint32 for a vocabulary beyond 65,536)
    source  TEXT,                 -- JSON: file, line, time, and whatever else is known of it
    seal    INTEGER               -- checksum of all of the above
)"""
INDICES = [
    "CREATE INDEX by_version ON texts (version)",
    "CREATE INDEX by_hash ON texts (hash)",
    "CREATE INDEX deleted ON texts (id) WHERE live = 0",
]
HAS_BASE = "SELECT 1 FROM sqlite_master WHERE name = 'base'"
INSERT = "INSERT INTO texts VALUES (?, ?, ?, ?, ?, ?, ?)"


class Text(NamedTuple):
    """A row of the table `texts`."""

    id: int
    version: int
    live: int
    hash: int
    tokens: bytes
    source: str
    seal: int

    def says(self, wanted):
        """Whether its source has all these keys and values; wanted: a dict of texts."""
        source = json.loads(self.source)
        return all(key in source and str(source[key]) == value for key, value in wanted.items())


def make_text(id, version, live, tokens, source):
    """A Text from its parts; tokens: bytes, source: a dict."""
    digest = hashlib.blake2b(tokens, digest_size=8).digest()
    hash = int.from_bytes(digest, "little", signed=True) if live else 0
    # half a letter that JSON lets in (a lone surrogate) stays an escape: SQLite takes UTF-8 alone
    source = json.dumps(source, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    text = Text(id, version, live, hash, tokens, source, 0)
    return text._replace(seal=seal_of(text))


def seal_of(text):
    """CRC-32 over all fields of a Text but its seal."""
    numbers = struct.pack("<qqqq", text.id, text.version, text.live, text.hash)
    crc = zlib.crc32(numbers)
    crc = zlib.crc32(text.tokens, crc)
    return zlib.crc32(text.source.encode(), crc)


def dtype_of(meta):
    return np.dtype(corpus.dtype_for(meta["n_vocab"])).newbyteorder("<")


def pack(tokens, meta, path):
    """Token ids as the table keeps them; UserError if they cannot be a reference of this base."""
    ref_len = meta["ref_len"]
    n_vocab = meta["n_vocab"]
    x = np.atleast_1d(np.asarray(tokens))
    valid = x.ndim == 1 and x.dtype.kind in "iu"
    valid = valid and 1 <= len(x) <= ref_len
    valid = valid and 0 <= x.min() and x.max() < n_vocab
    bounds = f"1 to {ref_len} tokens (ref_len), each 0 to {n_vocab - 1}"
    check(valid, f"{path}: a reference is {bounds}")
    x = x.astype(dtype_of(meta))
    return x.tobytes()


class Texts:
    """The references of a knowledge base, in `<path>/texts.sqlite`.

    Like corpus.References: len(), [i] -> token ids, iteration, batch, hash, n_vocab. But they
    can change: each change is one transaction, and `version` counts the transactions. A Texts keeps
    no rows, so it is never out of date, whatever other processes do, and it survives a fork.

    >>> import tempfile
    >>> meta = dict(n_vocab=50, ref_len=4)
    >>> texts = Texts.create(tempfile.mkdtemp(), meta, [[7, 8], [9]])
    >>> texts.add([[7, 8], [5, 6]]), texts.version         # the first is there already
    ([0, 2], 2)
    >>> texts.delete([1])
    >>> len(texts), texts.live().tolist(), texts[2].tolist(), texts[1].tolist()
    (3, [0, 2], [5, 6], [])
    """

    def __init__(self, path):
        self.path = Path(path)
        self.file = self.path / "texts.sqlite"
        self.connection = None
        self.connected_by = None  # the process whose connection it is
        self.inherited = []  # earlier connections, such as a parent's: neither used nor closed
        self.stamp = None  # of the files, where they can only be read
        self.lock = None  # of this process's threads: one transaction at a time
        cure = command("write.py", "--out", path)
        check(
            self.file.exists(), f"{self.file} is missing: no knowledge base here; make one: {cure}"
        )
        may_write = os.access(self.file, os.W_OK) and os.access(self.path, os.W_OK)
        self.writable = may_write
        self.meta = self._read_meta()
        self.n_vocab = self.meta["n_vocab"]
        self.ref_len = self.meta["ref_len"]
        self.dtype = dtype_of(self.meta)

    @staticmethod
    def create(path, meta, sequences, sources=None):
        """Makes a base of these token sequences in one transaction; an empty one is a deleted row.
        meta: what the base is, with at least n_vocab and ref_len. sources: a dict a sequence."""
        path = Path(path)
        make_directory(path)
        db = sqlite3.connect(path / "texts.sqlite", timeout=WAIT, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("BEGIN IMMEDIATE")
            if not db.execute(HAS_BASE).fetchall():  # else another process was quicker
                Texts._fill(db, path, meta, sequences, sources or [{}] * len(sequences))
            db.execute("COMMIT")
        finally:
            db.close()
        return Texts(path)

    @staticmethod
    def _fill(db, path, meta, sequences, sources):
        for statement in [BASE, TEXTS, *INDICES]:
            db.execute(statement)
        line = json.dumps(dict(format=FORMAT, id=uuid.uuid4().hex, **meta))
        db.execute("INSERT INTO base VALUES (?, ?)", (line, zlib.crc32(line.encode())))
        for i, (tokens, source) in enumerate(zip(sequences, sources, strict=True)):
            live = int(len(tokens) > 0)
            packed = pack(tokens, meta, path) if live else b""
            db.execute(INSERT, make_text(i, 1, live, packed, source))

    @staticmethod
    def exists(path):
        """Whether a base is at `path`. A kill during `create` leaves a file without tables."""
        file = Path(path) / "texts.sqlite"
        if not file.exists():
            return False
        db = sqlite3.connect(file)
        try:
            return bool(db.execute(HAS_BASE).fetchall())
        except sqlite3.DatabaseError:
            return True  # opening it will say what is wrong
        finally:
            db.close()

    def _read_meta(self):
        cure = command("write.py", "--out", self.path)
        check(
            self.run(HAS_BASE),
            f"{self.file} holds no base, its creation was cut short; make it: {cure}",
        )
        rows = self.run("SELECT meta, seal FROM base")
        complete = len(rows) == 1 and zlib.crc32(str(rows[0][0]).encode()) == rows[0][1]
        check(complete, f"{self.file} is damaged: {RESTORE}")
        meta = json.loads(rows[0][0])
        other = f"{self.file} is not a knowledge base of version {FORMAT[1]}: give another path"
        check(meta["format"] == FORMAT, other)
        return meta

    # -- the connection

    @property
    def db(self):
        """This process's connection: SQLite forbids carrying one over a fork."""
        stamp = None if self.writable else self._stamp()
        if self.connected_by != os.getpid() or stamp != self.stamp:
            self.stamp = stamp
            self.inherited.append(self.connection)
            self.connection = self._connect()
            self.lock = threading.RLock()
            self.connected_by = os.getpid()
        return self.connection

    def _stamp(self):
        """Changes with the files. Who only reads has no locks: it must look for itself whether
        somebody else has written, and then open them anew."""
        log = self.path / "texts.sqlite-wal"
        found = [file.stat() for file in (self.file, log) if file.exists()]
        return [(each.st_mtime_ns, each.st_size) for each in found]

    def _connect(self):
        mode = "rw"
        if not self.writable:
            # If nobody can be writing, SQLite needs no locks ("immutable"). If another user's
            # process is writing, its log is there and must be read, too.
            log = self.path / "texts.sqlite-wal"
            quiet = not log.exists() or log.stat().st_size == 0
            mode = "ro&immutable=1" if quiet else "ro"
        with self._refusals():
            uri = f"{self.file.resolve().as_uri()}?mode={mode}"
            options = dict(uri=True, timeout=1, isolation_level=None, check_same_thread=False)
            db = sqlite3.connect(uri, **options)
            db.execute("PRAGMA synchronous = FULL")  # acknowledged means: it survives a power cut
            db.execute("PRAGMA secure_delete = ON")  # deleted bytes are overwritten
        return db

    @contextmanager
    def _refusals(self):
        """Turns SQLite's errors into one line with the cure. (A ProgrammingError is our bug.)"""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            why = str(error).splitlines()[0]
            if "locked" in why:
                cure = f"another process has been changing it for {WAIT} s: end it, or try later"
            elif "full" in why:
                cure = "the disk is full; nothing was changed: free some space and try again"
            elif "readonly" in why or "unable to open" in why:
                cure = f"it cannot be opened ({why}): copy {self.path} to where you may write"
            else:
                cure = f"it is damaged ({why}): {RESTORE}"
            raise UserError(f"{self.file}: {cure}") from None

    def run(self, statement, *values):
        """Runs a statement and returns all its rows."""
        with self._refusals():
            return self.db.execute(statement, values).fetchall()

    @contextmanager
    def transaction(self, wait=WAIT):
        """Holds the base's only write lock, and commits all or nothing at the end. Yields (db, the
        number of this transaction). UserError if the lock is not free within `wait` seconds."""
        check(self.writable, f"{self.path} can only be read: copy it to where you may write")
        db = self.db
        with self.lock, self._refusals():
            self._begin(db, wait)
            try:
                yield db, self.version + 1
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def _begin(self, db, wait):
        first = min(wait, 1)
        try:
            db.execute(f"PRAGMA busy_timeout = {int(1000 * first)}")
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or wait <= first:
                raise
            line = f"{self.path}: another process is changing it; waiting for up to {wait} s"
            print(line, file=sys.stderr, flush=True)
            db.execute(f"PRAGMA busy_timeout = {int(1000 * (wait - first))}")
            db.execute("BEGIN IMMEDIATE")

    # -- reading

    def __len__(self):
        return self.run("SELECT coalesce(max(id) + 1, 0) FROM texts")[0][0]

    @property
    def version(self):
        """How many transactions have changed the texts."""
        return self.run("SELECT coalesce(max(version), 0) FROM texts")[0][0]

    @property
    def hash(self):
        """Names the texts exactly: the base's id and its version."""
        return f"{self.meta['id']}:{self.version}"

    def rows(self, ids):
        """The Texts of `ids`, in this order. UserError for ids that are not there, or damaged."""
        requested = [int(i) for i in ids]
        statement = "SELECT * FROM texts WHERE id IN (SELECT value FROM json_each(?))"
        found = {}
        for row in self.run(statement, json.dumps(requested)):
            found[row[0]] = self._sealed(row)
        for i in requested:
            if i not in found:
                n = len(self)
                check(0 <= i < n, f"{self.path} has {n} references, from 0, and no {i}")
                raise UserError(f"{self.file} is damaged: reference {i} is gone: {RESTORE}")
        return [found[i] for i in requested]

    def _sealed(self, row):
        """The Text of a row of the table. UserError if it is not as it was written."""
        try:
            text = Text(*row)
            complete = seal_of(text) == text.seal
        except (TypeError, AttributeError, struct.error):  # of another type than we write
            complete = False
        check(complete, f"{self.file} is damaged at reference {row[0]}: {RESTORE}")
        return text

    def changed_since(self, version):
        """The Texts that changed in transactions after number `version`, deleted ones too."""
        # "+id": sort what was found; by "id" SQLite would go through the whole table in that order
        found = self.run("SELECT * FROM texts WHERE version > ? ORDER BY +id", version)
        return [self._sealed(row) for row in found]

    def tokens(self, text):
        """The token ids of a Text, (n,) int64."""
        return np.frombuffer(text.tokens, self.dtype).astype(np.int64)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"reference {i}; {self.path} has {len(self)}")
        return self.tokens(self.rows([i])[0])

    def __iter__(self):
        n = len(self)
        for start in range(0, n, 1024):
            for text in self.rows(range(start, min(n, start + 1024))):
                yield self.tokens(text)

    def batch(self, ids, width=None):
        """(n, width) int64 on the CPU, -1 = padding on the right; width: the longest of them."""
        rows = [torch.from_numpy(self.tokens(text)) for text in self.rows(ids)]
        width = max([width or 0, *map(len, rows)])
        out = torch.full((len(rows), width), -1)  # (n, width)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out

    def live(self):
        """The ids that are not deleted, (n,) int64."""
        deleted = [row[0] for row in self.run("SELECT id FROM texts WHERE live = 0")]
        return np.setdiff1d(np.arange(len(self)), np.array(deleted, np.int64))

    def count_live(self):
        return len(self) - self.run("SELECT count(*) FROM texts WHERE live = 0")[0][0]

    def sources(self):
        """The source of every reference, a list of dicts."""
        return [json.loads(line) for (line,) in self.run("SELECT source FROM texts ORDER BY id")]

    def source(self, i):
        """What is known of where reference i comes from: a dict."""
        return json.loads(self.rows([i])[0].source)

    def origin(self, i):
        """Where reference i comes from, in one line: "towns.txt, line 12, 2024-05-01"."""
        parts = [f"{key} {value}" for key, value in self.source(i).items()]
        return ", ".join(parts)

    def find(self, tokens):
        """The id of the live reference that is exactly these tokens, or None."""
        tokens = pack(tokens, self.meta, self.path)
        return self._find(tokens, make_text(0, 0, 1, tokens, {}).hash)

    def _find(self, tokens, hash):
        for row in self.run("SELECT * FROM texts WHERE hash = ? ORDER BY id", hash):
            text = self._sealed(row)
            if text.live and text.tokens == tokens:
                return text.id
        return None

    # -- changing

    def insert(self, sequences, sources=None):
        """Adds references in one transaction, copies of known ones too; their ids."""
        return self.add(sequences, sources, copies=True)

    def add(self, sequences, sources=None, copies=False):
        """Adds references in one transaction and returns their ids. Unless `copies`, a text that is
        there already is not added again: its id is returned."""
        sources = sources or [{}] * len(sequences)
        texts = [pack(tokens, self.meta, self.path) for tokens in sequences]
        ids = []
        with self.transaction() as (db, version):
            n = len(self)
            for tokens, source in zip(texts, sources, strict=True):
                text = make_text(n, version, 1, tokens, source)
                listed = None if copies else self._find(tokens, text.hash)
                if listed is None:
                    db.execute(INSERT, text)
                    listed = n
                    n += 1
                ids.append(listed)
        return ids

    def replace(self, i, tokens, source=None, erase=None):
        """Gives reference i another text (a deleted one lives again). erase(ids): overwrites what
        was derived from the old text, before the new one counts."""
        tokens = pack(tokens, self.meta, self.path)
        with self.transaction() as (db, version):
            self.rows([i])  # it is there
            if erase:
                erase([i])
            self._put(db, make_text(int(i), version, 1, tokens, source or {}))

    def delete(self, ids, erase=None):
        """Deletes references. Their rows stay, empty, so that all other ids stay the same."""
        with self.transaction() as (db, version):
            texts = self.rows(ids)
            if erase:
                erase(ids)
            for text in texts:
                if text.live:
                    place = {k: v for k, v in json.loads(text.source).items() if k == "piece"}
                    self._put(db, make_text(text.id, version, 0, b"", place))

    def _put(self, db, text):
        db.execute("REPLACE INTO texts VALUES (?, ?, ?, ?, ?, ?, ?)", text)

    def compact(self):
        """Rewrites the file without its free pages and empties the log: what was deleted is in
        neither. UserError where another process still reads an older state."""
        check(self.writable, f"{self.path} can only be read: copy it to where you may write")
        self.run(f"PRAGMA busy_timeout = {1000 * WAIT}")
        self.run("VACUUM")
        self.run("PRAGMA busy_timeout = 1000")
        busy = self.run("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]
        check(not busy, f"{self.path}: another process is reading it: end it and compact again")

    def verify(self):
        """Reads the whole file; UserError for the first thing that is wrong with it."""
        rows = self.run("PRAGMA integrity_check(1)")
        answer = rows[0][0]
        check(answer == "ok", f"{self.file} is damaged ({answer}): {RESTORE}")
        n = len(self)
        for start in range(0, n, 1024):
            stop = min(n, start + 1024)
            self.rows(range(start, stop))


# -- Records -----------------------------------------------------------------------------------


class Records:
    """A file of fixed-size records, record i derived from reference i.

        record_bytes of numbers | how many slots are filled, uint32 | CRC-32, uint32

    The checksum covers the numbers, the filled slots, the seal of the text (and so its id, its
    tokens and its version) and the writer. So a hole in the file, a cut, a text that has changed
    since, or another model all make a record count as missing, and what is read is never wrong.
    """

    def __init__(self, file, record_bytes, slots, writer, writable, codec=None):
        self.file = file
        self.record_bytes = record_bytes
        self.slots = slots
        self.codec = codec
        self.stride = record_bytes + 8
        self.writer = zlib.crc32(writer.encode())
        self.writable = writable
        self.pool = None
        self.pool_of = None  # the process that started its threads: a fork has none
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        try:
            self.fd = os.open(file, flags, 0o644)
        except FileNotFoundError:
            self.fd = None  # on a medium that can only be read: all records are missing
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}: see its permissions") from None

    @property
    def threads(self):
        if self.pool_of != os.getpid():
            self.pool = ThreadPoolExecutor(THREADS)
            self.pool_of = os.getpid()
        return self.pool

    def checksum(self, text, record, filled):
        claim = struct.pack("<qqII", text.id, text.version, text.seal, filled)
        return zlib.crc32(record, zlib.crc32(claim, self.writer))

    def read(self, texts, rows):
        """Reads the records of Texts into rows, a list of (record_bytes,) uint8 arrays.
        -> filled slots (n,) int64, 0 where the record is missing or damaged."""
        filled = np.zeros(len(texts), np.int64)
        tails = np.zeros((len(texts), 2), "<u4")

        def read_some(share):
            for j in share:
                size = os.preadv(self.fd, [rows[j], tails[j]], texts[j].id * self.stride)
                n, crc = tails[j].tolist()
                # checked at once, while the record is in the processor's cache
                if size == self.stride and 1 <= n <= self.slots:
                    if self.checksum(texts[j], rows[j], n) == crc:
                        filled[j] = n

        if self.fd is not None and len(texts):
            shares = np.array_split(np.arange(len(texts)), min(THREADS, len(texts)))
            list(self.threads.map(read_some, shares))  # list() raises what a thread raised
        return filled

    def write(self, text, record, filled):
        """Writes the record of a Text. The caller holds the lock of the base's texts."""
        crc = self.checksum(text, record, filled)
        self._pwrite([record, struct.pack("<II", filled, crc)], text.id * self.stride)

    def erase(self, ids):
        """Overwrites the records `ids` with zeros; they are on the disk when this returns."""
        end = os.fstat(self.fd).st_size
        for i in ids:
            if i * self.stride < end:
                self._pwrite([bytes(self.stride)], i * self.stride)
        os.fdatasync(self.fd)

    def _pwrite(self, parts, at):
        try:
            size = os.pwritev(self.fd, parts, at)
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror}; no memory was changed") from None
        full = f"{self.file}: the disk is full: free some space and try again"
        check(size == self.stride, full)


# -- The bank ----------------------------------------------------------------------------------


class Kept(NamedTuple):
    """A record in RAM, with the seal of its text."""

    seal: int
    record: np.ndarray
    filled: int


class MemoryBank:
    """The memories of a knowledge base: texts on disk, and what a model made of them (sec. 3.1).

    With a model it encodes what is missing; without one it only reads what is there. Only the model
    that wrote memories can read them (Remark A.1). Any number of processes may read and change a
    base at once; recall() is not thread-safe. The same text gives the same memory up to rounding:
    in another batch, or on another machine, sums are computed in another order. recall() changes
    nothing on disk, except that it writes missing records.

        bank = MemoryBank.create("out/kb.bank", model, corpus.References.open("data/cities/kb"))
        bank.write()                                                       # warm start
        logits, _ = model(tokens, None, bank.recall([17, 4, 17]), recall)   # a pool of 3
        bank.append(tokenizer.encode("Zubrowka City has 4242 people."))
    """

    def __init__(self, path, references, model, codes, cache):
        self.path = Path(path)
        self.references = references
        self.model = model
        self.meta = references.meta
        self.shape = tuple(self.meta["shape"])  # (Lm, 2, Hkv, S, dh)
        self.heads = self.meta.get("heads")  # those that keep memories; None: all
        n_layers, two, kv_heads, *slots = self.shape
        self.record_shape = (len(self.heads), two, *slots) if self.heads else self.shape
        self.dtype = getattr(torch, self.meta["dtype"])
        self.device = model.device if model else torch.device("cpu")
        self.window = max(1, WINDOW // (math.prod(self.shape) * self.dtype.itemsize))

        # Whole documents (Remark 3.2): so many references, the first, are pieces of documents, and
        # a piece is encoded after at most 2 * half - 1 others; 0 = each reference is encoded alone
        self.n_pieces = self.meta.get("n_pieces", 0)
        self.half = self.meta.get("half", 0)

        self.memories = self._store("memories.bin", self.shape[-1] * self.dtype.itemsize)
        self.codes = None
        self.codes_made = None  # when their codec was written
        self._look_for_codes()
        cure = f"make them with: {_write_command(path, model)} --quantize"
        check(not codes or self.quantized, f"{path} has no quantized memories; {cure}")
        self.store = self.codes if codes else self.memories  # what recall reads
        self.codec = self.store.codec
        self.record_bytes = self.store.record_bytes
        self.vector = self.record_bytes // math.prod(self.record_shape[:-1])  # bytes of a key

        self.cache = {}  # id -> Kept, the least recently used first
        self.cache_size = cache
        self.hits = self.misses = self.encoded = 0
        self.room = ()

    def _store(self, name, vector_bytes, codec=None):
        """Opens a file of records. vector_bytes: of one key or value; the shape says how many."""
        writer = f"{self.meta['fingerprint']} {self.meta['tokenizer_id']} {self.meta['dtype']}"
        if self.n_pieces:
            writer += f" whole documents {self.half}"
        if codec:
            writer += f" {codec.spec} {zlib.crc32(codec.table.cpu().numpy())}"
        record_bytes = math.prod(self.record_shape[:-1]) * vector_bytes
        slots = self.shape[3]
        writable = self.references.writable
        return Records(self.path / name, record_bytes, slots, writer, writable, codec)

    def __len__(self):
        return len(self.references)

    @property
    def quantized(self):
        """Whether there are quantized memories beside the others."""
        return self.codes is not None

    @property
    def stores(self):
        """All files of records: what is encoded goes into each, what is deleted leaves each."""
        self._look_for_codes()
        return [self.memories, self.codes] if self.quantized else [self.memories]

    def _look_for_codes(self):
        """Opens the codes, also if another process has made them since: deletes must reach them."""
        file = self.path / "codes" / "codec.npz"
        made = file.stat().st_mtime_ns if file.exists() else None
        if made != self.codes_made:
            self.codes_made = made
            self.codes = None
            if made:
                codec = load_codec(self.path, self.model).to(self.device)
                self.codes = self._store("codes/codes.bin", codec.bytes, codec)

    @staticmethod
    def create(path, model, references, dtype="bfloat16", whole_documents=False):
        """A base of these references (corpus.References, or another base's), its memories missing;
        or the base that is there already, if it was made of the same.
        dtype: bfloat16 or float32, of the memories. whole_documents: references that are pieces of
        one document are encoded as one sequence (Remark 3.2). UserError where `path` holds
        something else, or a reference is longer than ref_len."""
        path = Path(path)
        c = model.config
        check(dtype in ("bfloat16", "float32"), f"dtype {dtype}: a bank is in bfloat16 or float32")
        made_of = f"{Path(references.path).name} {references.hash}"
        if not Texts.exists(path):
            longest = max([0, *(len(row) for row in references)])
            valid = longest <= c.ref_len and references.n_vocab <= c.vocab_size
            found = f"{references.path}: {longest} tokens, vocabulary of {references.n_vocab}"
            check(valid, f"{found}; the model takes ref_len {c.ref_len} and {c.vocab_size}")
            check_free(path)
            with lock(path):  # one process makes it, the others take it as it is then
                if not Texts.exists(path):
                    how = dtype, whole_documents, made_of
                    MemoryBank._make_base(path, model, references, *how)
        bank = MemoryBank.open(path, model)
        found = bank.meta["dtype"]
        check(found == dtype, f"{path} is a bank of {found}, not of {dtype}: give another --out")
        bank.check_documents(whole_documents)
        line = f"{path} was made of other references than {references.path} as it is now"
        cure = "the base itself is whole; for the new ones give another --out"
        check(bank.meta["made_of"] == made_of, f"{line}: {cure}")
        return bank

    @staticmethod
    def _make_base(path, model, references, dtype, whole_documents, made_of):
        """Fills a free directory with the texts and what else a base needs."""
        c = model.config
        if isinstance(references, Texts):
            data = references.path
            sources = references.sources()
        else:
            data = Path(references.path).parent
            name = Path(references.path).name
            sources = [dict(file=name, row=i) for i in range(len(references))]
        half = 0
        if whole_documents:
            half = max(1, c.max_context // c.ref_len // 2)
            line = f"whole documents: max_context {c.max_context} < ref_len {c.ref_len}"
            check(c.max_context >= c.ref_len, f"{line} leaves no room for two pieces")
            add_places(sources, references)
        meta = dict(
            n_vocab=references.n_vocab,
            ref_len=c.ref_len,
            tokenizer_id=copy_tokenizer(data, path, references.n_vocab),
            shape=c.memory_shape,
            heads=c.kept_heads,
            dtype=dtype,
            fingerprint=model.fingerprint(),
            made_of=made_of,
            n_pieces=len(references) if whole_documents else 0,
            half=half,
        )
        Texts.create(path, meta, references, sources)

    @staticmethod
    def open(path, model=None, codes=False, cache=1024):
        """The base at `path`. model: its writer; None: only what is there can be read. codes:
        recall the quantized memories. cache: memories that are kept in RAM.
        UserError, one line with the cure, for what must not be read."""
        references = Texts(path)
        meta = references.meta
        shape = meta["shape"]
        complete = len(shape) == 5 and all(isinstance(n, int) and 0 < n < 1 << 20 for n in shape)
        complete = complete and math.prod(shape) < 1 << 32
        complete = complete and meta["dtype"] in ("bfloat16", "float32")
        complete = complete and are_heads(meta.get("heads"), shape)
        check(complete, f"{references.file}: memories of shape {shape} are none of ours: {RESTORE}")
        if model:
            writer = meta["fingerprint"]
            reader = model.fingerprint()
            checkpoint = getattr(model, "path", "checkpoints/toy")
            line = f"{path} is of model {writer}: {reader} cannot read those memories (Remark A.1)"
            flags = ["--checkpoint", checkpoint, "--references", path]
            flags += ["--out", f"{path}.{reader[:4]}", "--dtype", meta["dtype"]]
            flags += ["--whole_documents"] if meta.get("n_pieces") else []
            cure = command("write.py", *flags)
            cure = f"write its texts for this model into another base: {cure}"
            check(reader == writer, f"{line}; {cure}")
            line = f"{references.file}: memories of {tuple(shape)}, the model's are of"
            equal = tuple(shape) == tuple(model.config.memory_shape)
            check(equal, f"{line} another shape: {RESTORE}")
        return MemoryBank(path, references, model, codes, cache)

    def check_documents(self, whole):
        """UserError if the base is of whole documents and `whole` is False, or the other way."""
        if self.n_pieces:
            line = "whole documents: add --whole_documents"
        else:
            line = "references that are encoded alone: drop --whole_documents"
        equal = whole == (self.n_pieces > 0)
        check(equal, f"{self.path} is of {line}, or give another --out")

    # -- whole documents

    def _before(self, text):
        """The ids of the pieces after which a Text is encoded; none where it stands alone.

        A document of at most 2 * half pieces is one sequence. A longer one is encoded in windows of
        so many, each half a window further: a piece sees at least the half - 1 before it, and its
        window does not depend on how long the others are."""
        piece = 0
        if text.live and text.id < self.n_pieces:
            piece = json.loads(text.source).get("piece", 0)
        if piece == 0:
            return range(text.id, text.id)
        first = max(0, piece // self.half - 1) * self.half
        return range(text.id - piece + first, text.id)

    def _after(self, ids):
        """The ids of the pieces in whose memories references `ids` have left something."""
        found = set()
        if not self.n_pieces:
            return []
        for i in map(int, ids):
            last = min(i + 2 * self.half, self.n_pieces)
            for text in self.references.rows(range(i + 1, last)):
                if i in self._before(text):
                    found.add(text.id)
        return sorted(found)

    def _texts(self, ids):
        """The Texts of `ids` as they are now. The seal of a piece also covers the pieces before it:
        if one of them changes, the memories that have seen it no longer fit and count as missing.
        """
        texts = self.references.rows(ids)
        if not self.n_pieces:
            return texts
        windows = [self._before(text) for text in texts]
        requested = {text.id for text in texts}.union(*windows)
        rows = self.references.rows(sorted(requested))  # all at one moment
        current = {text.id: text for text in rows}
        result = []
        for text, window in zip(texts, windows, strict=True):
            seals = struct.pack(f"<{len(window)}q", *(current[i].seal for i in window))
            text = current[text.id]
            result.append(text._replace(seal=zlib.crc32(seals, text.seal)))
        return result

    # -- reading

    def recall(self, ids, decode=True):
        """The memories of references `ids` (1-D, any order, repeats allowed), as a pool.
        Row m is the memory of ids[m], on the model's device, in the dtype of the bank (from codes:
        float32, or with decode=False the codes); for a deleted reference it is empty, count 0. What
        the cache in RAM (sec. 3.1) lacks is read from disk, and what is missing there is encoded.
        UserError for ids out of range or, without a model, for a missing memory."""
        ids = torch.as_tensor(ids).cpu().numpy()
        is_row = ids.ndim == 1 and (not ids.size or ids.dtype.kind in "iu")
        check(is_row, f"recall takes a row of integers, not {ids.dtype} of {ids.shape}")
        ids, order = np.unique(ids.astype(np.int64), return_inverse=True)
        texts = self._texts(ids)  # as they are now: what is read must fit them
        buffer = self._buffer(len(texts))
        filled = self._load(texts, buffer.numpy())  # (n,)
        kv = buffer.to(self.device, non_blocking=True)
        kv = kv.view(len(texts), *self.record_shape[:-1], self.vector)  # bytes
        if not self.codec:
            kv = kv.view(self.dtype)  # (n, *record_shape)
        elif decode:  # only the codes crossed the bus
            kv = self.codec.decode(kv)  # (n, *record_shape)
        kv = unpack_heads(kv, self.heads, self.shape[0], self.shape[2])  # (n, Lm, 2, Hkv, S, dh)
        pool = Memories(kv, torch.from_numpy(filled).to(self.device))
        if np.array_equal(order, np.arange(len(ids))):
            return pool  # already in the order of ids: no copy
        return pool[torch.from_numpy(order).to(self.device)]

    def _load(self, texts, rows):
        """Fills rows (n, record_bytes) uint8 with the records of Texts, from RAM, from the disk, or
        encoded now. Returns the filled slots (n,)."""
        filled = np.zeros(len(texts), np.int64)
        new = []
        for j, text in enumerate(texts):
            kept = self.cache.pop(text.id, None)
            if not text.live:
                rows[j] = 0
            elif kept and kept.seal == text.seal:
                self.cache[text.id] = kept  # now the most recently used
                rows[j] = kept.record
                filled[j] = kept.filled
            else:
                new.append(j)
        self.hits += len(texts) - len(new)
        self.misses += len(new)
        filled[new] = self.store.read([texts[j] for j in new], [rows[j] for j in new])
        missing = [j for j in new if filled[j] == 0]
        if missing:
            self._cold_start(texts, missing, rows, filled)
        for j in new if self.cache_size else []:
            self.cache[texts[j].id] = Kept(texts[j].seal, rows[j].copy(), int(filled[j]))
            if len(self.cache) > self.cache_size:
                del self.cache[next(iter(self.cache))]
        return filled

    def _cold_start(self, texts, missing, rows, filled):
        """Encodes the texts that have no record, and stores the records if it may write."""
        line = f"{self.path}: the memory of reference {texts[missing[0]].id} is missing or damaged"
        self._need_model(line)
        if not self.encoded:
            print(f"{self.path}: cold start, memories are encoded at their first retrieval")
        self.encoded += len(missing)
        row_of = {texts[j].id: j for j in missing}
        for part, kv, count, stores in self._make([texts[j] for j in missing]):
            for text, record, n in zip(part, as_records(self.store, kv), count, strict=True):
                rows[row_of[text.id]] = record
                filled[row_of[text.id]] = n
            if self.references.writable:
                try:
                    self._keep(part, kv, count, stores, wait=1)
                except UserError:  # another process changes the base: encoded again next time
                    pass

    def _buffer(self, n):
        """Room for n records. It is used again each time, for getting new pages from the system
        takes longer than reading records into them. On CUDA it is pinned, so that the GPU can copy
        from it on its own; PyTorch keeps such buffers for later calls."""
        if self.device.type == "cuda":
            return torch.empty((n, self.record_bytes), dtype=torch.uint8, pin_memory=True)
        in_use = sys.getrefcount(self.room) > 2  # by an earlier pool; 2 are self and the argument
        if n > len(self.room) or in_use:
            self.room = np.empty((n, self.record_bytes), np.uint8)
        return torch.from_numpy(self.room[:n])

    def live(self):
        """The ids that are not deleted (n,)."""
        return self.references.live()

    def verify(self, ids=None):
        """The ids (of `ids`, or of all) whose record is missing or damaged. Reads the records of
        all of them; changes nothing."""
        room = np.empty((self.window, self.record_bytes), np.uint8)
        bad = []
        for texts in self._windows(ids):
            rows = list(room[: len(texts)])
            filled = self.store.read(texts, rows)
            bad += [text.id for text, n in zip(texts, filled, strict=True) if n == 0]
        return bad

    def _windows(self, ids=None):
        """Yields the live Texts (of `ids`), at most self.window at a time."""
        ids = self.live() if ids is None else np.asarray(ids, np.int64)
        for start in range(0, len(ids), self.window):
            texts = self._texts(ids[start : start + self.window])
            yield [text for text in texts if text.live]

    def stats(self):
        """One line about the cache."""
        asked = self.hits + self.misses
        rate = self.hits / asked if asked else 0.0
        counts = f"{self.hits:,} hits, {self.misses:,} misses"
        encoded = f"{self.encoded:,} of them encoded at their first retrieval"
        size = f"cache of {self.cache_size:,} memories"
        return f"{size}: hit rate {rate:.3f} ({counts}, {encoded})"

    # -- writing

    def write(self, batch=64, progress=True, shard=(1, 1)):
        """Warm start: writes every memory that is missing or damaged, and returns how many there
        were. If it is stopped, the next call goes on where it was, since each record says by itself
        whether it is the memory of its text. shard (i, n), 1 <= i <= n: only the i-th of n shares
        of the references, so that n processes can fill one base at once."""
        self._need_model(f"{self.path}: it is open for reading only")
        i, n_shards = shard
        # neighbours stay together: pieces of a whole document are encoded with those before them
        ids = np.array_split(self.live(), n_shards)[i - 1]
        todo = self.verify(ids)
        n = len(ids)
        with tqdm(total=n, initial=n - len(todo), unit=" memories", disable=not progress) as bar:
            for texts in self._windows(todo):
                for part, kv, count, stores in self._make(texts, batch):
                    self._keep(part, kv, count, stores)
                    bar.update(len(part))
        return len(todo)

    def _make(self, texts, batch=64):
        """Encodes `texts` in parts. Yields (Texts, kv (n, *record_shape) on the CPU, a list of
        counts (n,), the stores to put them into). For codes, what memories.bin has is read there
        and not encoded again."""
        if self.codec:
            rows = np.empty((len(texts), self.memories.record_bytes), np.uint8)
            filled = self.memories.read(texts, list(rows))
            there = np.flatnonzero(filled)
            if len(there):
                kv = torch.from_numpy(rows[there]).view(len(there), *self.record_shape[:-1], -1)
                part = [texts[j] for j in there]
                yield part, kv.view(self.dtype), filled[there].tolist(), [self.store]
            texts = [text for text, n in zip(texts, filled, strict=True) if n == 0]
        if self.n_pieces:
            yield from self._make_documents(texts, batch)
            return
        # Batches of texts of one length, so that no padding is computed; the longest first, so that
        # what does not fit into the device's RAM fails at once.
        by_length = defaultdict(list)
        for text in texts:
            by_length[len(text.tokens)].append(text)
        for length in sorted(by_length, reverse=True):
            group = by_length[length]
            for start in range(0, len(group), batch):
                part = group[start : start + batch]
                tokens = np.stack([self.references.tokens(text) for text in part])
                with torch.inference_mode():
                    made = self.model.write(torch.from_numpy(tokens))
                yield part, self._packed(made, part), made.count.tolist(), self.stores

    def _make_documents(self, texts, batch):
        """As _make, for whole documents (Remark 3.2): at least `batch` pieces at a time, together
        with the pieces before them."""
        windows = defaultdict(list)  # id at which a window begins -> the Texts to encode in it
        for text in sorted(texts, key=operator.attrgetter("id")):
            begin = text.id - len(self._before(text))
            windows[begin].append(text)
        last = next(reversed(windows), None)
        ids = []
        documents = []  # the window of each id
        part = []
        rows = []  # where in ids each Text of part stands
        for begin, to_encode in windows.items():
            rows += [len(ids) + text.id - begin for text in to_encode]
            part += to_encode
            window = range(begin, to_encode[-1].id + 1)
            ids += window
            documents += [begin] * len(window)
            if len(ids) < batch and begin != last:
                continue
            with torch.inference_mode():
                tokens = self.references.batch(ids)  # (n, longest)
                made = self.model.write(tokens, documents=torch.tensor(documents))
            made = made[rows]
            yield part, self._packed(made, part), made.count.tolist(), self.stores
            ids = []
            documents = []
            part = []
            rows = []

    def _packed(self, made, texts):
        """The memories of Texts as they are stored, (n, *record_shape) on the CPU."""
        kv = pack_heads(made.kv.to("cpu", self.dtype), self.heads)
        line = f"{self.path}: the memory of reference {texts[0].id} or a neighbour has NaN"
        check(kv.isfinite().all(), f"{line} or infinity: the model's weights are damaged")
        return kv

    def _keep(self, texts, kv, count, stores, wait=WAIT):
        """Stores memories in each store, as numbers or as codes."""
        records = [(store, as_records(store, kv)) for store in stores]
        self._put(texts, records, count, wait)

    def _put(self, texts, records, count, wait=WAIT):
        """Stores records [(store, rows (n, record_bytes) uint8), ...] of Texts, under the lock, and
        only those of texts that have not changed meanwhile."""
        with self.references.transaction(wait):
            current = self._texts([text.id for text in texts])
            for j, text in enumerate(texts):
                if current[j] == text:
                    for store, rows in records:
                        store.write(text, rows[j], count[j])

    def _need_model(self, why):
        cure = f"with its model: {command('write.py', '--out', self.path)}"
        check(self.model, f"{why}; write it {cure}")

    # -- changing

    def append(self, tokens, source=None):
        """Adds a reference (1 to ref_len token ids, without header) and its memory; returns its id.
        source: a dict that says where it comes from."""
        (i,) = self.references.insert([tokens], [source or {}])
        self._fill([i])
        return i

    def add(self, sequences, sources=None):
        """Adds many references in one transaction, and their memories; returns their ids. A text
        that is there already is not added again: its id is returned."""
        ids = self.references.add(sequences, sources)
        self._fill(ids)
        return ids

    def replace(self, i, tokens, source=None):
        """Gives reference i another text (a deleted one lives again) and that text's memory. A kill
        leaves one of the two texts; its memory is then missing or right. A piece of a whole
        document stays in its place there, and the memories of the pieces after it count as missing.
        """
        if i < self.n_pieces:
            place = self.references.source(i).get("piece", 0)
            source = dict(source or {}, piece=place)
        self.references.replace(i, tokens, source, self._erase)
        self._fill([i])
        return i

    def delete(self, ids):
        """Forgets references (one id, or many): their tokens and memories are overwritten before
        this returns. Their ids are never used again; recalling one gives an empty memory. Memories
        of later pieces of the same whole document have seen it: they go, too, and count as missing.
        """
        self.references.delete(np.atleast_1d(ids).tolist(), self._erase)

    def _erase(self, ids):
        ids = [*ids, *self._after(ids)]
        for i in ids:
            self.cache.pop(int(i), None)
        for store in self.stores:
            store.erase(ids)

    def _fill(self, ids):
        """Encodes what is missing of `ids`; without a model it stays missing."""
        if not self.model:
            return
        room = np.empty((self.window, self.record_bytes), np.uint8)
        for texts in self._windows(ids):
            filled = self.store.read(texts, list(room[: len(texts)]))
            missing = [text for text, n in zip(texts, filled, strict=True) if n == 0]
            for part, kv, count, stores in self._make(missing):
                self._keep(part, kv, count, stores)

    def quantize(self, spec=None, progress=True):
        """Makes the quantized memories (sec. 3.3) beside the others, or completes them; returns the
        bank that recalls them. spec: of the codec; None: chosen by size. The codec is trained on
        vectors drawn uniformly from the filled slots of references drawn uniformly (App. B): 65,536
        vectors, or 640,000 for heads of 64 numbers or more."""
        check(not self.codec, f"{self.path}: these are the quantized memories already")
        if not self.quantized:
            self._train_codec(spec)
        bank = MemoryBank.open(self.path, self.model, codes=True, cache=self.cache_size)
        found = bank.codec.spec
        line = f"{self.path} has codec {found}: drop --codec, or quantize another base"
        check(spec in (None, found), line)
        bank.write(progress=progress)
        return bank

    def _train_codec(self, spec):
        rng = np.random.default_rng(0)
        sample = self.recall(rng.permutation(self.live())[: 4 * self.window])
        filled = torch.arange(self.shape[3], device=self.device) < sample.count[:, None]  # (n, S)
        kv = pack_heads(sample.kv, self.heads)  # (n, Lm, 2, Hkv, S, dh), or (n, K, 2, S, dh)
        vectors = kv.transpose(1, -2)[filled]  # (filled, 2, Hkv, Lm, dh), or (filled, 2, K, dh)
        vectors = vectors.flatten(0, -2)  # (filled * 2 * Hkv * Lm, dh)
        sample = 65_536 if self.shape[4] < 64 else 640_000  # see quantize.default_spec
        codec = Codec.train(vectors[rng.permutation(len(vectors))[:sample]], spec)
        codec.save(self.path / "codes")

    def compact(self):
        """Frees what deletions left behind: afterwards no file of texts holds a deleted one."""
        self.references.compact()


def add_places(sources, references):
    """Notes in the source of each piece of a whole document how many stand before it."""
    if isinstance(references, Texts):  # the sources of a base say it already
        cure = "drop --whole_documents, or name the data set that it was made of"
        complete = references.meta.get("n_pieces", 0)
        check(complete, f"{references.path}: its documents are not known: {cure}")
        for source in sources[complete:]:  # added later: encoded alone
            source.pop("piece", None)
        return
    for source, place in zip(sources, references.places().tolist(), strict=True):
        source["piece"] = place


def are_heads(heads, shape):
    """Whether `heads` can be Config.kept_heads of memories of this shape (Lm, 2, Hkv, S, dh)."""
    if heads is None:
        return True
    if not isinstance(heads, list) or not heads:
        return False
    every = [[i, h] for i in range(shape[0]) for h in range(shape[2])]
    return all(pair in every for pair in heads)


def as_records(store, kv):
    """kv (n, *record_shape) -> (n, record_bytes) uint8: as numbers, or as the store's codes."""
    rows = store.codec.encode(kv) if store.codec else kv
    return rows.contiguous().view(torch.uint8).view(len(kv), -1).numpy()


OURS = {"texts.sqlite", "texts.sqlite-wal", "texts.sqlite-shm", "texts.sqlite-journal", "lock"}
OURS |= {"memories.bin", "codes", "index", "index.new", "index.old"}
OURS |= {"relevance.json", "tokenizer.json", "meta.json"}


def check_free(path):
    """UserError unless `path` is free, or holds only a base whose creation was cut short."""
    if not path.exists():
        return
    free = path.is_dir() and {f.name.removesuffix(".tmp") for f in path.iterdir()} <= OURS
    check(free, f"{path} holds something else than a knowledge base: give another path")


def copy_tokenizer(data, path, n_vocab):
    """Copies the tokenizer of a data directory into a base; returns its id, or None without one."""
    tokenizer_id = None
    named = (data / "meta.json").exists() and "tokenizer" in corpus.manifest(data)
    if named or (data / "tokenizer.json").exists():
        tokenizer = corpus.tokenizer(data)
        tokenizer.save(path / "tokenizer.json")
        tokenizer_id = tokenizer.id
    meta = dict(name=path.name, n_vocab=n_vocab)
    if tokenizer_id:
        meta |= dict(tokenizer=".", tokenizer_id=tokenizer_id)
    write_json(path / "meta.json", meta)
    return tokenizer_id


def _write_command(path, model):
    """The command that writes the base at `path` with its model, if that is known."""
    flags = ["--checkpoint", model.path] if hasattr(model, "path") else []
    return command("write.py", *flags, "--out", path)


def load_codec(path, model):
    try:
        return Codec.load(path / "codes")
    except UserError as error:
        remove = shlex.join(["rm", "-r", str(path / "codes")])
        again = _write_command(path, model) + " --quantize"
        cure = f"make the codes anew: {remove} (texts and memories stay), then {again}"
        raise UserError(f"{error}; {cure}") from None
