"""Texts as token files: tokenizer, memmapped training tokens, references, manifest (sec. 4).

A prepared data set is a directory, made by data/<name>/prepare.py:
    meta.json           manifest: what is in it, how it was made
    tokenizer.json      byte-pair ranks, where the data set has its own tokenizer
    <split>.bin         tokens of a split, uint16 (uint32 for a vocabulary beyond 65,536)
    <refs>.bin, .idx    references: their tokens end to end, and N+1 offsets (int64)
Nothing here knows what the texts are about.
"""

import base64
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

from common import UserError, check, optional, replace_file


class Tokenizer:
    """A tiktoken encoding with the few things a decoder needs around it.
    bos: id of the token every text begins with. header: the modified BOS of references, the tokens
    of "<s>Reference:" (sec. 3.2). id: name and hash of the vocabulary, stored wherever tokens are.
    prefix_space: a space before the first word, as Llama has it: a name is one thing everywhere."""

    def __init__(self, encoding, bos, name, prefix_space=False):
        self.encoding, self.bos, self.prefix_space = encoding, bos, prefix_space
        self.n_vocab = encoding.n_vocab
        ranks = b"".join(sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get))
        self.id = f"{name}:{hashlib.sha256(ranks).hexdigest()[:8]}"
        self.header = [bos, *encoding.encode_ordinary("Reference:")]

    def encode(self, text):
        """Token ids of a text, without BOS."""
        lead = " " if self.prefix_space and text and not text[0].isspace() else ""
        return self.encoding.encode_ordinary(lead + text)

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
    tiktoken, path = optional("tiktoken"), Path(name, "tokenizer.json")
    if path.exists():
        d = json.loads(path.read_text())
        ranks = {base64.b64decode(t): i for i, t in enumerate(d["ranks"])}
        encoding = tiktoken.Encoding(
            d["name"],
            pat_str=d["pattern"],
            mergeable_ranks=ranks,
            special_tokens={"<s>": len(ranks)},
        )
        return Tokenizer(encoding, len(ranks), d["name"], d["prefix_space"])
    if path.parent.is_dir() or os.sep in str(name):
        used = manifest(name)["tokenizer"] if path.with_name("meta.json").exists() else name
        return tokenizer(_present(path) if Path(used) == path.parent else used)  # raises
    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError:
        known = f"a data directory, or one of {', '.join(tiktoken.list_encoding_names())}"
        raise UserError(f"unknown tokenizer {name!r}: {known}") from None
    except Exception as e:  # tiktoken fetches its files at first use
        what = f"tokenizer {name!r} could not be fetched ({type(e).__name__})"
        raise UserError(f"{what}: it needs the network once, or TIKTOKEN_CACHE_DIR") from e
    return Tokenizer(encoding, encoding.eot_token, name)


def _present(path):
    """A file of a prepared data set: its path, or UserError with the command to run."""
    if not path.exists():
        flag = " --train" if path.stem in ("train", "explicit", "train_refs") else ""
        raise UserError(f"{path} is missing: run python {path.parent}/prepare.py{flag}")
    return path


def manifest(data_dir):
    """The meta.json of a prepared data set, as a dict."""
    path = _present(Path(data_dir) / "meta.json")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:
        raise UserError(f"{path} is damaged: run python {path.parent}/prepare.py") from None


def dtype_for(n_vocab):
    return np.uint16 if n_vocab <= 65536 else np.uint32


def open_tokens(data_dir, split):
    """The tokens of a split, as a read-only memmap."""
    path = _present(Path(data_dir) / f"{split}.bin")
    check(path.stat().st_size, f"{path} is empty: there is no token in it")
    return np.memmap(path, dtype_for(manifest(data_dir)["n_vocab"]), mode="r")


def write_tokens(path, tokens, n_vocab):
    replace_file(path, lambda f: f.write(np.asarray(tokens, dtype_for(n_vocab)).tobytes()))


class References:
    """The knowledge base as text: N token sequences of at most ref_len tokens (sec. 4.4).
    Row i of a memory bank is the memory of reference i."""

    def __init__(self, path, tokens, offsets, n_vocab):
        self.path, self.tokens, self.offsets, self.n_vocab = path, tokens, offsets, n_vocab

    @staticmethod
    def create(path, sequences, n_vocab):
        """Writes <path>.bin and <path>.idx. Refuses an empty list and empty references."""
        check(len(sequences), f"{path}: no references to write")
        lengths = np.array([len(s) for s in sequences])
        check(lengths.all(), f"{path}: reference {lengths.argmin()} is empty")
        tokens = np.concatenate([np.asarray(s, np.int64) for s in sequences])
        check(0 <= tokens.min() <= tokens.max() < n_vocab, f"{path}: token ids are below {n_vocab}")
        offsets = np.append(0, lengths.cumsum()).astype("<i8")
        write_tokens(f"{path}.bin", tokens, n_vocab)
        replace_file(f"{path}.idx", lambda f: f.write(offsets.tobytes()))
        return References.open(path, n_vocab)

    @staticmethod
    def open(path, n_vocab=None):
        """path: "<data dir>/<name>". n_vocab is read from the data set's manifest."""
        text, index = (_present(Path(f"{path}{ext}")) for ext in (".bin", ".idx"))
        n_vocab = n_vocab or manifest(text.parent)["n_vocab"]
        check(text.stat().st_size, f"{text} is empty: there is no reference in it")
        tokens, offsets = np.fromfile(text, dtype_for(n_vocab)), np.fromfile(index, "<i8")
        whole = index.stat().st_size % 8 == 0 and len(offsets) > 1 and offsets[0] == 0
        whole = whole and offsets[-1] <= len(tokens) and (np.diff(offsets) > 0).all()
        check(whole, f"{index} does not fit {text}: one of them is cut off")
        return References(Path(path), tokens[: offsets[-1]], offsets, n_vocab)

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"reference {i}; {self.path} has {len(self)}")
        return self.tokens[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)

    def batch(self, ids, width=None):
        """(n, width) int64 on the CPU, -1 = padding on the right; width: the longest of them."""
        rows = [torch.from_numpy(self[int(i)]) for i in ids]
        rows.append(torch.zeros(width or 0, dtype=torch.int64))  # only to make the others so wide
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)[:-1]

    @property
    def hash(self):
        return hashlib.sha256(self.offsets.tobytes() + self.tokens.tobytes()).hexdigest()[:16]

    def append(self, sequence):
        """Adds a reference; returns its id. Tokens go first: a kill leaves some no offset names."""
        return self.replace(len(self), sequence)

    def replace(self, i, sequence):
        """Sets reference i (or, with i = N, appends). The files are written beside and renamed."""
        if not 0 <= i <= len(self):
            raise IndexError(f"reference {i}; {self.path} has {len(self)}")
        rows = np.split(self.tokens, self.offsets[1:-1])
        rows[i : i + 1] = [sequence]
        new = References.create(self.path, rows, self.n_vocab)
        self.tokens, self.offsets = new.tokens, new.offsets
        return i
