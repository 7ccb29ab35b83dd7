"""What tests of commands share: banks in RAM, and a data set of 17 made-up places on disk."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT

import common
import corpus
from bank import MemoryBank
from memory import Memories
from model import Config, Memory3, save_checkpoint
from retrieval import Live, Retriever


class Bank:
    """A bank in RAM: memory i is row i of a pool."""

    def __init__(self, memories):
        self.memories = memories
        self.loads = []

    def recall(self, ids):
        self.loads.append(list(ids))
        assert sorted({*ids}) == list(ids) and min(ids) >= 0  # each once, and never "none"
        return self.memories[torch.as_tensor(ids)]


class Quantized(Bank):
    """The same, quantized."""

    def __init__(self, memories, codec):
        super().__init__(memories)
        self.codec = codec
        self.codes = codec.encode(memories.kv)

    def recall(self, ids, decode=True):
        self.loads.append(decode)
        kv = self.codes[torch.as_tensor(ids)]
        ids = torch.as_tensor(ids)
        return Memories(self.codec.decode(kv) if decode else kv, self.memories.count[ids])


class Log:
    """A retriever that logs its calls and answers by the query's tokens: distinct references."""

    def __init__(self, n, table=None):
        self.n = n
        self.calls = []
        self.table = table

    def search(self, queries, k):
        queries = [q.split() if isinstance(q, str) else q for q in queries]
        self.calls.append([[int(t) for t in q] for q in queries])
        ids = [np.random.default_rng([*q, 7]).permutation(self.n)[:k] for q in self.calls[-1]]
        return np.array(ids), np.linspace(0.9, 0.1, k) + np.zeros((len(queries), 1))


def some_tokens(B, T, seed=11):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 90, (B, T), generator=g)
    tokens[:, 0] = 96
    return tokens


PLACES = "Aba Bel Cor Dun Eld Fen Gor Hul Ist Jar Kol Lum Mor Nis Orl Pry Qua".split()


def text_of(i):
    name = PLACES[i] + "holm"
    return f"{name} has {1013 * (i + 3)} people. {name} is in {PLACES[-i - 1]}land."


class World:
    """A prepared data set, a checkpoint and a bank in one directory."""

    def __init__(self, root, tok):
        self.data = root / "data"
        self.tok = tok
        self.data.mkdir(parents=True)
        shutil.copy(ROOT / "data/cities/tokenizer.json", self.data)
        meta = dict(name="places", tokenizer=str(self.data), n_vocab=tok.n_vocab)
        common.write_json(self.data / "meta.json", meta)
        texts = [tok.encode(text_of(i)) for i in range(len(PLACES))]
        refs = corpus.References.create(self.data / "kb", texts, tok.n_vocab)
        Retriever.build(f"{self.data}/kb.index", refs, str(self.data), progress=False)
        self.checkpoint = root / "model.pt"
        self.bank = root / "kb.bank"
        self.model = self.save(self.checkpoint, seed=1)
        bank = MemoryBank.create(self.bank, self.model, refs)
        bank.write()
        Live.build(bank.references, progress=False)

    def save(self, path, seed, tokenizer=None, **changes):
        torch.manual_seed(seed)
        shape = dict(
            n_layer=3,
            n_memory_layer=2,
            n_head=6,
            n_kv_head=2,
            head_dim=12,
            mlp_width=34,
            vocab_size=self.tok.n_vocab,
            header=self.tok.header,
            max_context=190,
            chunk_len=16,
            n_recall=3,
            memory_tokens=5,
            ref_len=29,
        )
        model = Memory3(Config(**{**shape, **changes}))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(6.0) if p.dim() == 2 else None
        meta = dict(
            config=json.loads(json.dumps(vars(model.config))),
            stage="explicit",
            step=0,
            tokenizer=tokenizer or self.tok.id,
        )
        save_checkpoint(path, model.state_dict(), meta)
        return model.eval()

    def open(self):
        bank = MemoryBank.open(self.bank, self.model)
        return Live.open(bank.references), bank

    def args(self, *more, **changes):
        flags = dict(checkpoint=self.checkpoint, data=self.data, bank=self.bank, device="cpu")
        flags |= dict(prompt="How many people live in Belholm?", tokens=9, stop="") | changes
        return [*(str(x) for k, v in flags.items() for x in (f"--{k}", v)), *more]


def bytes_of(folder):
    """The files of a folder; SQLite's log and its index are there while a process reads."""
    found = {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
    return {p: data for p, data in found.items() if not p.name.endswith(("-wal", "-shm"))}


def prompt_of(world, text):
    return torch.tensor([[world.tok.bos, *world.tok.encode(text)]])


def copy_of(built, root):
    """A copy of a World under another root, for a test that spoils it."""
    shutil.copytree(built.data.parent, root)
    copy = object.__new__(World)
    copy.__dict__ = dict(vars(built), data=root / "data")
    copy.checkpoint = root / "model.pt"
    copy.bank = root / "kb.bank"
    meta = json.loads((copy.data / "meta.json").read_text())
    common.write_json(copy.data / "meta.json", dict(meta, tokenizer=str(copy.data)))
    return copy
