"""Texts as token files: tokenizer, memmapped training tokens, references, manifest (sec. 4).

A prepared data set is a directory:
    meta.json           manifest: what is in it, how it was made
    tokenizer.json      byte-pair ranks, where the data set has its own tokenizer
    <split>.bin         tokens of a split, uint16 (uint32 for a vocabulary beyond 65,536)
    <refs>.bin, .idx    references: their tokens end to end, and N+1 offsets (int64)
Everything is made by data/<name>/prepare.py; nothing here knows what the texts are about.
"""

import base64
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

class Tokenizer:
    """A tiktoken encoding with the few things a decoder needs around it.

    bos: id of the token every text begins with. header: the modified BOS of references, the tokens
    of "<s>Reference:" (sec. 3.2). id: name and hash of the vocabulary, stored wherever tokens are.
    """

    def __init__(self, encoding, bos, name, prefix_space=False):
        self.encoding, self.bos, self.prefix_space = encoding, bos, prefix_space
        self.n_vocab = encoding.n_vocab
        ranks = b"".join(sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get))
        self.id = f"{name}:{hashlib.sha256(ranks).hexdigest()[:8]}"
        self.header = [bos, *encoding.encode_ordinary("Reference:")]

    def encode(self, text):
        """Token ids of a text, without BOS. With prefix_space a space is put before the first word
        (as Llama's tokenizer does), so that a name is the same tokens wherever it stands."""
        if self.prefix_space and text and not text[0].isspace():
            text = " " + text
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """The text of token ids; BOS, -1 padding and ids of no token become nothing."""
        ids = [int(t) for t in ids if 0 <= int(t) < self.n_vocab and int(t) != self.bos]
        return self.encoding.decode(ids, errors="replace")

def tokenizer(name):
    """The tokenizer of a data directory (its tokenizer.json), or one of tiktoken's by name.

    >>> t = tokenizer("data/cities")
    >>> t.decode(t.encode("Kyiv has 2797553 people."))
    ' Kyiv has 2797553 people.'
    """
    import tiktoken

    path = Path(name) / "tokenizer.json"
    if path.exists():
        d = json.loads(path.read_text())
        ranks = {base64.b64decode(t): i for i, t in enumerate(d["ranks"])}
        bos = len(ranks)
        encoding = tiktoken.Encoding(
            name=d["name"], pat_str=d["pattern"], mergeable_ranks=ranks, special_tokens={"<s>": bos}
        )
        return Tokenizer(encoding, bos, d["name"], prefix_space=d["prefix_space"])
    if Path(name).is_dir() or os.sep in str(name):
        # a data set that uses another's, or one of tiktoken's
        used = manifest(name)["tokenizer"] if (Path(name) / "meta.json").exists() else name
        if Path(used) != Path(name):
            return tokenizer(used)
        raise FileNotFoundError(f"{path} is missing: run python {Path(name) / 'prepare.py'}")
    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError:
        raise ValueError(
            f"unknown tokenizer {name!r}: a data directory, or one of "
            f"{', '.join(tiktoken.list_encoding_names())}"
        ) from None
    except Exception as e:  # tiktoken fetches its files at first use
        raise RuntimeError(
            f"tokenizer {name!r} could not be fetched ({type(e).__name__}): tiktoken needs the "
            "network once, or its files in TIKTOKEN_CACHE_DIR"
        ) from e
    return Tokenizer(encoding, encoding.eot_token, name)

def manifest(data_dir):
    """The meta.json of a prepared data set, as a dict."""
    path = Path(data_dir) / "meta.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run python {Path(data_dir) / 'prepare.py'}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:
        raise ValueError(f"{path} is damaged: run python {Path(data_dir) / 'prepare.py'}") from None

def dtype_for(n_vocab):
    return np.uint16 if n_vocab <= 65536 else np.uint32

def open_tokens(data_dir, split):
    """The tokens of a split, as a read-only memmap."""
    path = Path(data_dir) / f"{split}.bin"
    if not path.exists():
        flag = " --train" if split in ("train", "explicit") else ""
        raise FileNotFoundError(f"{path} is missing: run python {data_dir}/prepare.py{flag}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: there is no token in it")
    return np.memmap(path, dtype_for(manifest(data_dir)["n_vocab"]), mode="r")

def replace_file(path, write):
    """Writes a file beside its place with write(file), then renames it: never a half file."""
    tmp = Path(f"{path}.tmp")
    with open(tmp, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)

def write_json(path, obj):
    replace_file(path, lambda f: f.write((json.dumps(obj, indent=1) + "\n").encode()))

def write_tokens(path, tokens, n_vocab):
    replace_file(path, lambda f: f.write(np.asarray(tokens, dtype_for(n_vocab)).tobytes()))

class References:
    """The knowledge base as text: N token sequences of at most ref_len tokens (sec. 4.4).

    Row i of a memory bank is the memory of reference i.
    """

    def __init__(self, path, tokens, offsets, n_vocab):
        self.path, self.tokens, self.offsets, self.n_vocab = path, tokens, offsets, n_vocab

    @staticmethod
    def create(path, sequences, n_vocab):
        """Writes <path>.bin and <path>.idx. Refuses an empty list and empty references."""
        if len(sequences) == 0:
            raise ValueError(f"{path}: no references to write")
        lengths = [len(s) for s in sequences]
        if 0 in lengths:
            raise ValueError(f"{path}: reference {lengths.index(0)} is empty")
        tokens = np.concatenate([np.asarray(s, np.int64) for s in sequences])
        if tokens.min() < 0 or tokens.max() >= n_vocab:
            raise ValueError(f"{path}: token ids are 0 to {n_vocab - 1}, not {tokens.min()} to "
                             f"{tokens.max()}")  # fmt: skip
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
        write_tokens(f"{path}.bin", tokens, n_vocab)
        replace_file(f"{path}.idx", lambda f: f.write(offsets.tobytes()))
        return References.open(path, n_vocab)

    @staticmethod
    def open(path, n_vocab=None):
        """path: "<data dir>/<name>". n_vocab is read from the data set's manifest."""
        path = Path(path)
        for ext in (".bin", ".idx"):
            if not Path(f"{path}{ext}").exists():
                flag = " --train" if path.name == "train_refs" else ""
                raise FileNotFoundError(
                    f"{path}{ext} is missing: run python {path.parent}/prepare.py{flag}"
                )
        n_vocab = n_vocab or manifest(path.parent)["n_vocab"]
        if os.path.getsize(f"{path}.bin") == 0:
            raise ValueError(f"{path}.bin is empty: there is no reference in it")
        tokens = np.fromfile(f"{path}.bin", dtype_for(n_vocab))
        offsets = np.fromfile(f"{path}.idx", "<i8")
        whole = os.path.getsize(f"{path}.idx") % 8 == 0 and len(offsets) > 1 and offsets[0] == 0
        if not whole or offsets[-1] > len(tokens) or (np.diff(offsets) <= 0).any():
            raise ValueError(f"{path}.idx does not fit {path}.bin: one of them is cut off")
        return References(path, tokens[: offsets[-1]], offsets, n_vocab)

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"reference {i}; {self.path} has {len(self)}")
        return self.tokens[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)

    def batch(self, ids, width=None):
        """(n, width) int64 on the CPU, -1 = padding on the right; width: the longest of them."""
        rows = [self[int(i)] for i in ids]
        width = width or max(len(r) for r in rows)
        out = torch.full((len(rows), width), -1)
        for i, r in enumerate(rows):
            out[i, : len(r)] = torch.from_numpy(r)
        return out

    @property
    def hash(self):
        h = hashlib.sha256(self.offsets.tobytes())
        h.update(self.tokens.tobytes())
        return h.hexdigest()[:16]

    def append(self, sequence):
        """Adds a reference on disk and here; returns its id. Tokens first, offsets last: a kill
        between the two leaves tokens that no offset names."""
        return self.replace(len(self), sequence)

    def replace(self, i, sequence):
        """Sets reference i (or, with i = N, appends). The files are written beside and renamed."""
        if not 0 <= i <= len(self):
            raise IndexError(f"reference {i}; {self.path} has {len(self)}")
        rows = [self.tokens[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]
        rows[i : i + 1] = [sequence]
        new = References.create(self.path, rows, self.n_vocab)
        self.tokens, self.offsets = new.tokens, new.offsets
        return i
