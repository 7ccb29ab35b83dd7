"""The knowledge base on disk: what it returns, what a kill, damage or another process leaves, what
it refuses. Odd sizes."""

import doctest
import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPE

import bank as bank_module
import corpus
import memory
from bank import MemoryBank, Texts
from common import UserError, write_json
from model import Config, Memory3
from quantize import Codec

N, V, S = 23, 37, 5
CONFIG = dict(SHAPE, vocab_size=V, memory_tokens=S, ref_len=13, header=(1, 2, 3))
SPEC = "Residual2x6,PQ5x6"


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def build(seed=1):
    torch.manual_seed(seed)
    model = Memory3(Config(**CONFIG))
    for p in model.parameters():
        p.data *= 4 if p.dim() == 2 else 1  # attention that has preferences
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(autouse=True)
def small_window(monkeypatch):
    """Three windows and more wherever a whole bank is read."""
    monkeypatch.setattr(bank_module, "WINDOW", 7 * 2 * 2 * 3 * S * 10 * 2)


@pytest.fixture
def references(tmp_path):
    rng = np.random.default_rng(2)
    lengths = [1, 3, *rng.integers(1, 14, N - 3), 13]  # shorter than S, and the longest
    rows = [rng.integers(0, V, n).tolist() for n in lengths]
    write_json(tmp_path / "meta.json", dict(n_vocab=V))
    return corpus.References.create(tmp_path / "kb", rows, V)


@pytest.fixture(scope="module")
def written(tmp_path_factory, model):
    """A base whose memories are all there."""
    folder = tmp_path_factory.mktemp("written")
    rng = np.random.default_rng(2)
    lengths = [1, 3, *rng.integers(1, 14, N - 3), 13]
    rows = [rng.integers(0, V, n).tolist() for n in lengths]
    write_json(folder / "meta.json", dict(n_vocab=V))
    references = corpus.References.create(folder / "kb", rows, V)
    bank = MemoryBank.create(folder / "bank", model, references)
    assert bank.write(batch=4, progress=False) == N
    return folder / "bank"


@pytest.fixture
def bank(tmp_path, written, model):
    """A copy of it that a test may spoil."""
    shutil.copytree(written, tmp_path / "bank")
    return MemoryBank.open(tmp_path / "bank", model)


def right(pool, model, references, ids, dtype=torch.bfloat16):
    """Whether row m of the pool is what the model writes for reference ids[m]. In another batch
    sums come in another order, so to rounding."""
    with torch.inference_mode():
        for m, i in enumerate(ids):
            want = model.write(references.batch([i]))
            near = torch.allclose(
                pool.kv[m].float(), want.kv[0].to(dtype).float(), rtol=0.02, atol=0.02
            )
            if not near or int(pool.count[m]) != int(want.count):
                return False
    return True


def files(folder):
    """What a base has on disk; SQLite's log and its index are there while a process reads."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and not path.name.endswith(("-wal", "-shm")):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def flip(path, at):
    """One bit of a file."""
    with open(path, "r+b") as f:
        f.seek(at)
        old = f.read(1)[0]
        f.seek(at)
        f.write(bytes([old ^ 64]))


def test_docstrings():
    """A worked example that its function no longer gives."""
    for module, least in ((bank_module, 6), (memory, 3)):
        found = doctest.testmod(module, extraglobs=dict(np=np, torch=torch))
        assert found.attempted >= least and not found.failed


# -- What it returns


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_recall_is_write(tmp_path, model, references, dtype):
    """A row of another reference, an order or a repeat lost, counts of short references."""
    bank = MemoryBank.create(tmp_path / "bank", model, references, dtype)
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    assert bank.record_bytes == 2 * 2 * 3 * S * 10 * size
    assert bank.write(progress=False) == N and bank.write(progress=False) == 0
    again = MemoryBank.open(tmp_path / "bank")  # without a model
    for ids in ([22, 0, 7, 0, 22, 1, 3, 2, 4], list(range(N))[::-1], [5]):
        for kind in (list, np.array, torch.tensor, lambda x: np.array(x, np.int32)):
            pool = again.recall(kind(ids))
            assert pool.kv.dtype == getattr(torch, dtype) and pool.count.dtype == torch.int64
        assert right(pool, model, references, ids, getattr(torch, dtype))
    assert again.recall([0, 1]).count.tolist() == [1, 3]
    for nothing in ([], np.zeros(0, int)):
        assert again.recall(nothing).kv.shape == (0, 2, 2, 3, S, 10)


def test_only_kept_heads_take_room(tmp_path, model, references):
    """Records of all heads where half of them keep nothing; heads that change places on disk; codes
    trained on zeros; a base of all heads that is read as one of some, or the reverse."""
    torch.manual_seed(1)
    half = Memory3(Config(**CONFIG, memory_heads="0.2,1.0,1.1"))
    half.load_state_dict(model.state_dict())
    bank = MemoryBank.create(tmp_path / "half", half.eval(), references)
    assert bank.record_bytes == 3 * 2 * S * 10 * 2 and bank.write(progress=False) == N
    ids = [22, 0, 7, 1, 0]
    for again in (bank, MemoryBank.open(tmp_path / "half")):
        pool = again.recall(ids)
        assert pool.kv.shape == (5, 2, 2, 3, S, 10) and right(pool, half, references, ids)
        assert (pool.kv[:, 0, :, :2] == 0).all() and (pool.kv[0, 1, :, 0] != 0).all()
    codes = bank.quantize(SPEC, progress=False)
    assert codes.record_bytes == 3 * 2 * S * codes.codec.bytes
    packed = memory.pack_heads(bank.recall(ids).kv, bank.heads)
    want = codes.codec.decode(codes.codec.encode(packed))
    assert torch.equal(memory.pack_heads(codes.recall(ids).kv, bank.heads), want)
    raw = codes.recall(ids, decode=False).kv
    assert torch.equal(codes.codec.decode(memory.pack_heads(raw, bank.heads)), want)
    with pytest.raises(UserError, match="is of model"):
        MemoryBank.open(tmp_path / "half", model)


def test_the_same_batches_give_the_same_bytes(tmp_path, model, references):
    """A base that differs from run to run on one machine."""
    made = []
    for name in ("a", "b"):
        bank = MemoryBank.create(tmp_path / name, model, references)
        bank.write(batch=3, progress=False)
        kv = bank.recall(range(N)).kv
        made.append(kv.clone())
    assert torch.equal(*made)


def test_the_texts_are_a_copy(tmp_path, model, references):
    """A base that names its texts by a path, which another file may take."""
    bank = MemoryBank.create(tmp_path / "bank", model, references)
    for i in range(N):
        assert bank.references[i].tolist() == references[i].tolist()
    assert [x.tolist() for x in bank.references] == [x.tolist() for x in references]
    assert torch.equal(bank.references.batch([3, 1], 13), references.batch([3, 1], 13))
    assert bank.references.source(5) == dict(file="kb", row=5)
    os.remove(tmp_path / "kb.bin")
    (tmp_path / "bank").rename(tmp_path / "moved")
    assert len(MemoryBank.open(tmp_path / "moved", model)) == N
    for i in (-1, N):
        with pytest.raises(IndexError):
            bank.references[i]


def test_creation_is_sparse_and_in_one_go(tmp_path, model, references, monkeypatch):
    """A terabyte of zeros written at creation; half a base that passes for one."""
    bank = MemoryBank.create(tmp_path / "a" / "bank", model, references)
    assert (bank.path / "memories.bin").stat().st_blocks == 0
    assert bank.verify() == list(range(N))
    make_text = bank_module.make_text

    def dies(i, *rest):
        if i == 11:
            raise Killed
        return make_text(i, *rest)

    with monkeypatch.context() as m:
        m.setattr(bank_module, "make_text", dies)
        with pytest.raises(Killed):
            MemoryBank.create(tmp_path / "b", model, references)
    assert not Texts.exists(tmp_path / "b")
    with pytest.raises(UserError, match="holds no base.*write.py --out"):
        MemoryBank.open(tmp_path / "b")
    assert len(MemoryBank.create(tmp_path / "b", model, references)) == N


def test_cache(bank):
    """Hits that are none, a cache that grows, one that drops what was just used."""
    bank = MemoryBank.open(bank.path, cache=3)
    for ids, hits, misses, kept in [
        ([4, 2, 4], 0, 2, [2, 4]),
        ([2], 1, 2, [4, 2]),
        ([7], 1, 3, [4, 2, 7]),
        ([9, 2], 2, 4, [7, 2, 9]),  # 4 was the least recently used
        ([4], 2, 5, [2, 9, 4]),
        ([1, 3, 5, 6, 2], 3, 9, [3, 5, 6]),  # more than fit
    ]:
        bank.recall(ids)
        assert (bank.hits, bank.misses, list(bank.cache)) == (hits, misses, kept)
    assert bank.stats().startswith("cache of 3 memories: hit rate 0.250 (3 hits, 9 misses, 0 of")
    none = MemoryBank.open(bank.path, cache=0)
    assert torch.equal(none.recall([2, 2]).kv, none.recall([2, 2]).kv) and none.misses == 2


@pytest.mark.parametrize("cache", [0, 2, 1024])
def test_a_pool_stays_as_it_was(bank, model, cache):
    """The memory of a pool in use that the next recall reads into; one that is never used again."""
    bank = MemoryBank.open(bank.path, cache=cache)
    pools = [(ids, bank.recall(ids)) for ids in ([3, 9], [9, 4], [1, 2, 3], [3, 9], [4, 1])]
    for ids, pool in pools:
        assert right(pool, model, bank.references, ids)
    bank = MemoryBank.open(bank.path, cache=0)
    places = set()
    for ids in ([3, 9], [4, 5], [1, 2], [7]):
        pool = bank.recall(ids)
        part = pool.kv[:, 1]  # a view is use, too
        places.add(pool.kv.data_ptr())
        del pool, part
    assert len(places) == 1


def test_who_only_asks_only_reads(model, bank):
    """Generation that writes into its stored caches (MemOS); a file touched at opening."""
    before = files(bank.path)
    for m in (None, model):
        reader = MemoryBank.open(bank.path, m, cache=4)
        for ids in ([3, 1], [1, 9, 3, 1], range(N), [3]):
            pool = reader.recall(list(ids))
            pool.kv.mul_(7)  # what a reader does to its pool stays with it
            pool.count.zero_()
        assert reader.verify() == []
        assert torch.equal(reader.recall([3, 1]).kv, bank.recall([3, 1]).kv)
    assert bank.write(progress=False) == 0
    assert files(bank.path) == before


def test_bad_input(bank):
    """-1 that reads the last memory; a text cut to ref_len, or its tokens modulo 65,536."""
    for ids in ([0, N], [-1, 3]):
        with pytest.raises(UserError, match="23 references, from 0, and no"):
            bank.recall(ids)
    for ids in ([[1, 2]], [0.5], 3):
        with pytest.raises(UserError, match="a row of integers"):
            bank.recall(ids)
    before = bank.references.hash
    for tokens, line in [
        ([], "1 to 13 tokens"),
        ([1] * 14, "1 to 13"),
        ([V], "0 to 36"),
        ([-1], "0 to 36"),
        ([0.5], "0 to 36"),
        ([65537], "0 to 36"),
        ([[1, 2]], "0 to 36"),
    ]:
        for change in (bank.append, lambda t: bank.replace(2, t), lambda t: bank.add([[1], t])):
            with pytest.raises(UserError, match=line):
                change(tokens)
    for i in (-1, N + 1):
        with pytest.raises(UserError, match="and no "):
            bank.replace(i, [1])
        with pytest.raises(UserError, match="and no "):
            bank.delete([3, i])
    assert bank.references.hash == before and len(bank) == N and bank.verify() == []
    reader = MemoryBank.open(bank.path)
    with pytest.raises(UserError, match="reading only"):
        reader.write()


def test_create_refuses(tmp_path, model, references, bank):
    """Texts that the model cannot read; a directory of something else filled with our files."""
    long = corpus.References.create(tmp_path / "long", [[1], [2] * 14], V)
    with pytest.raises(UserError, match="14 tokens"):
        MemoryBank.create(tmp_path / "no", model, long)
    many = corpus.References.create(tmp_path / "many", [[1], [V]], V + 1)
    with pytest.raises(UserError, match="vocabulary of 38"):
        MemoryBank.create(tmp_path / "no", model, many)
    with pytest.raises(UserError, match="dtype float16"):
        MemoryBank.create(tmp_path / "no", model, references, "float16")
    assert not (tmp_path / "no").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("three years")
    for path in (tmp_path / "full", tmp_path / "kb.bin", tmp_path):
        with pytest.raises((UserError, OSError)) as e:
            MemoryBank.create(path, model, references)
        assert "something else" in str(e.value) or isinstance(e.value, OSError)
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match=r"texts.sqlite is missing.*python write.py --out"):
        MemoryBank.open(tmp_path / "nowhere")


def test_create_again(tmp_path, model, references):
    """A complete base emptied by a second `write.py`; other texts taken for those of it."""
    bank = MemoryBank.create(tmp_path / "bank", model, references)
    bank.write(progress=False)
    before = files(bank.path)
    assert MemoryBank.create(bank.path, model, references).verify() == []
    with pytest.raises(UserError, match="is a bank of bfloat16, not of float32"):
        MemoryBank.create(bank.path, model, references, "float32")
    other = corpus.References.create(tmp_path / "other", [[1], [2]], V)
    with pytest.raises(UserError, match="was made of other references"):
        MemoryBank.create(bank.path, model, other)
    assert files(bank.path) == before


def test_refuses_another_models_memories(tmp_path, bank, model):
    """Remark A.1: after an update of the weights the memories are not readable, but look so. The
    cure writes the same texts, with the same ids, for the other model."""
    bank.delete(3)
    other = build(seed=3)
    with pytest.raises(UserError) as e:
        MemoryBank.open(bank.path, other)
    line = str(e.value)
    assert (
        "\n" not in line
        and f"write.py --checkpoint checkpoints/toy --references {bank.path}" in line
        and f"--dtype {bank.meta['dtype']}" in line
    )
    assert other.fingerprint() in line and model.fingerprint() in line
    second = MemoryBank.create(tmp_path / "second", other, bank.references)
    assert second.live().tolist() == bank.live().tolist()
    assert second.write(progress=False) == N - 1
    assert right(second.recall([2, 4]), other, bank.references, [2, 4])
    assert second.references.source(4) == bank.references.source(4)


def test_rounded_weights_read_and_heal_their_bank(bank):
    """A bank that generation in bfloat16 can no longer open, or adds nothing to."""
    flip(bank.path / "memories.bin", 6 * bank.store.stride + 17)
    half = MemoryBank.open(bank.path, build().rounded(torch.bfloat16))
    healed, want = half.recall([6, 3]), bank.recall([3]).kv
    assert half.encoded == 1 and half.verify() == [] and torch.equal(healed.kv[1:], want)


# -- Live changes


def test_append_replace_delete(model, bank):
    """A text whose memory is another's; a cache that remembers the old text; ids that move."""
    untouched = [i for i in range(N) if i not in (4, 6)]
    bank.recall([6])
    assert bank.append([5, 6, 7], dict(line=3)) == N and bank.replace(6, [8] * 13) == 6
    assert bank.append(torch.tensor([9]).numpy()) == N + 1
    again = MemoryBank.open(bank.path)
    assert len(again) == len(bank) == N + 2
    assert again.references[N].tolist() == [5, 6, 7] and again.references[6].tolist() == [8] * 13
    assert again.references.source(N) == dict(line=3)
    for b in (bank, again):
        assert b.verify() == []
        for ids in ([6, N + 1, N], untouched):
            assert right(b.recall(ids), model, bank.references, ids)
    bank.delete(4)
    for b in (bank, again, MemoryBank.open(bank.path, model)):
        pool = b.recall([3, 4])
        assert pool.count.tolist()[1] == 0 and not pool.kv[1].any()
        assert b.verify() == [] and 4 not in b.live() and len(b) == N + 2
    assert bank.write(progress=False) == 0
    again = MemoryBank.open(bank.path, model)
    again.replace(4, [11, 12])  # it lives again
    assert right(bank.recall([4, 5]), model, bank.references, [4, 5])


def test_a_text_is_added_once(bank):
    """A fact stored again, in other company; a deleted one that cannot be told again."""
    known = bank.references[7].tolist()
    ids = bank.add([[1, 2, 3], known, [1, 2, 3], [3, 2, 1]], [dict(line=i) for i in range(4)])
    assert ids == [N, 7, N, N + 1] and len(bank) == N + 2
    assert bank.references.find([1, 2, 3]) == N and bank.references.find([1, 2]) is None
    bank.delete([N, 7])
    assert bank.references.find([1, 2, 3]) is None
    assert bank.add([[1, 2, 3], known]) == [N + 2, N + 3]
    assert bank.recall([N + 2, N + 3]).count.min() > 0 and bank.verify() == []


def test_the_cost_of_a_change_does_not_grow(tmp_path):
    """A statement that goes through the whole table: one change then costs as much as all texts."""

    def steps_of(n):
        """The steps of SQLite's machine in each kind of change, in a base of n texts."""
        meta = dict(n_vocab=5000, ref_len=3)
        texts = Texts.create(tmp_path / str(n), meta, [[i] for i in range(n)])
        count = []
        texts.db.set_progress_handler(lambda: count.append(1), 1)
        found = []
        for change in (
            lambda: texts.add([[4998, 7], [5]]),  # a new one, and one that is there
            lambda: texts.replace(9, [4999]),
            lambda: texts.delete([11]),
            lambda: texts.changed_since(texts.version - 2),
            lambda: (len(texts), texts.hash, texts.count_live(), texts.find([17])),
        ):
            count.clear()
            change()
            found.append(len(count))
        return np.array(found)

    small = steps_of(61)
    large = steps_of(2999)
    assert small.min() > 9
    assert (large < 1.5 * small).all(), (small, large)


def test_a_deleted_fact_leaves_every_file(tmp_path, model, bank):
    """Its numbers in memories.bin or the codes, its tokens in the log, in a free page."""
    codes = bank.quantize(SPEC, progress=False)
    secret = [31, 33, 35, 31, 33, 35, 30, 31, 36, 31, 33]
    i = bank.append(secret, dict(note="a secret source"))
    numbers = bank.recall([i]).kv.clone().view(torch.uint8).numpy().tobytes()
    coded = codes.recall([i], decode=False).kv.numpy().tobytes()
    tokens = np.array(secret, "<u2").tobytes()
    held = [path for path in bank.path.rglob("*") if path.is_file()]

    def holds(what):
        return [path.name for path in held if path.exists() and what in path.read_bytes()]

    assert holds(numbers) and holds(coded) and holds(tokens) and holds(b"a secret source")
    bank.delete(i)
    assert not holds(numbers) and not holds(coded)  # at once
    bank.compact()
    assert not holds(tokens) and not holds(b"a secret source")
    assert bank.references[i].tolist() == [] and codes.recall([i]).count.tolist() == [0]
    assert codes.write(progress=False) == 0 and i not in codes.live()


def test_a_handle_out_of_date_reverts_nothing(model, bank):
    """Reference 4 as it was before another process changed it, with a clean verify()."""
    a, b = MemoryBank.open(bank.path, model), MemoryBank.open(bank.path, model)
    a.recall([4]), b.recall([4])
    b.replace(4, [1, 2, 3])
    a.replace(5, [4, 5, 6])
    assert a.append([7]) == N and b.append([8]) == N + 1
    for bank in (a, b):
        assert bank.references[4].tolist() == [1, 2, 3]
        ids = [4, 5, N, N + 1]
        assert right(bank.recall(ids), model, bank.references, ids) and bank.verify() == []


def test_a_cold_start_stores_no_stale_memory(model, bank, monkeypatch):
    """The memory of the text as it was a moment ago, vouched for as that of the new one."""
    flip(bank.path / "memories.bin", 4 * bank.store.stride + 3)
    asks = MemoryBank.open(bank.path, model, cache=0)
    write, old = model.write, bank.references[4]

    def slow(tokens):  # meanwhile another process changes the text
        monkeypatch.setattr(model, "write", write)
        made = write(tokens)
        bank.replace(4, [1, 2, 3])
        return made

    monkeypatch.setattr(model, "write", slow)
    pool = asks.recall([4])  # of the text that it found
    assert int(pool.count) == min(S, len(old))
    assert right(asks.recall([4]), model, bank.references, [4]) and bank.verify() == []


def test_write_during_a_replace(tmp_path, model, references, monkeypatch):
    """The old text's memory under the new text, in a batch that was being written."""
    bank = MemoryBank.create(tmp_path / "bank", model, references)
    other = MemoryBank.open(bank.path, model)
    write, calls = model.write, itertools.count()

    def slow(tokens):
        made = write(tokens)
        if next(calls) == 1:
            monkeypatch.setattr(model, "write", write)
            for i in range(N):
                other.replace(i, [i, 1, 2])
            monkeypatch.setattr(model, "write", slow)
        return made

    monkeypatch.setattr(model, "write", slow)
    bank.write(batch=5, progress=False)
    monkeypatch.setattr(model, "write", write)
    assert bank.write(progress=False) == 0
    assert right(bank.recall(range(N)), model, bank.references, range(N))


def test_changes_need_no_model(bank, model):
    """An append without a model that vouches for a memory which is not there."""
    texts_only = MemoryBank.open(bank.path)
    i = texts_only.append([3, 1, 4])
    texts_only.replace(2, [2, 7, 1])
    assert texts_only.verify() == [2, i]
    with pytest.raises(UserError, match="memory of reference 2 is missing.*write.py --out"):
        texts_only.recall([2])
    assert bank.write(progress=False) == 2
    assert right(bank.recall([2, i]), model, bank.references, [2, i])


# -- Kills


@pytest.mark.parametrize("change", ["append", "replace", "revive", "delete"])
def test_a_kill_at_any_moment_of_a_change(tmp_path, model, bank, monkeypatch, change):
    """The new text with the old memory, a deleted fact that can be read, a base that a kill makes
    useless. A kill is an exception that nothing catches, at each call that touches a file."""
    if change == "revive":
        bank.delete(8)
    old = [tokens.tolist() for tokens in bank.references]
    new = [7] * 5
    after = list(old)
    if change == "append":
        after.append(new)
    else:
        after[8] = [] if change == "delete" else new
    bank.references.run("PRAGMA wal_checkpoint(TRUNCATE)")
    outcomes = set()
    for at in itertools.count():
        here = tmp_path / f"{at}"
        shutil.copytree(bank.path, here)
        victim = MemoryBank.open(here, model)
        calls = itertools.count()

        def mortal(function, at=at, calls=calls):
            def call(*args, **kwargs):
                if next(calls) == at:
                    raise Killed
                return function(*args, **kwargs)

            return call

        changes = dict(append=lambda v: v.append(new), delete=lambda v: v.delete(8))
        with monkeypatch.context() as m:
            m.setattr(os, "pwritev", mortal(os.pwritev))
            m.setattr(os, "fdatasync", mortal(os.fdatasync))
            m.setattr(model, "write", mortal(model.write))
            m.setattr(bank_module, "make_text", mortal(bank_module.make_text))
            try:
                changes.get(change, lambda v: v.replace(8, new))(victim)
                finished = True
            except Killed:
                finished = False
        reader = MemoryBank.open(here, model)
        texts = [tokens.tolist() for tokens in reader.references]
        assert texts in (old, after)
        assert set(reader.verify()) <= {8, N}
        live = reader.live()
        assert right(reader.recall(live), model, reader.references, live)
        outcomes.add(texts == after)
        reader.append([1, 2])  # and life goes on
        if finished:
            break
    assert at >= 2 and outcomes == {False, True}


def test_resumes_after_a_kill_at_any_write(tmp_path, model, references, monkeypatch):
    """A record that vouches for what is not there, or only half."""
    pwritev = os.pwritev
    for at in range(0, N, 4):
        bank = MemoryBank.create(tmp_path / f"{at}", model, references)
        calls = itertools.count()

        def dies(fd, parts, offset, calls=calls, at=at):
            if next(calls) == at:
                os.pwrite(fd, bytes(memoryview(parts[0]).cast("B")[:11]), offset)
                raise Killed
            return pwritev(fd, parts, offset)

        with monkeypatch.context() as m:
            m.setattr(os, "pwritev", dies)
            with pytest.raises(Killed):
                bank.write(batch=3, progress=False)
        again = MemoryBank.open(bank.path, model)
        left = again.verify()
        assert len(left) == N - at
        assert again.write(progress=False) == len(left)
        assert right(again.recall(range(N)), model, references, range(N))


KILLED = """
import os, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import test_bank
from bank import MemoryBank
bank = MemoryBank.open({path!r}, test_bank.build())
print("ready", flush=True)
i = 0
while True:
    i += 1
    kept = bank.append([i % 37, i // 37 % 37, 5])
    bank.replace(3, [i % 37, 2, 1])
    bank.delete(kept - 1 if kept > 25 else 24)
    print(i, flush=True)
"""


def child(path, text=KILLED):
    tests = Path(__file__).parent
    code = text.format(root=str(tests.parent), tests=str(tests), path=str(path))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_killed_process_loses_nothing_that_it_said(bank, model):
    """A fact that was acknowledged and is gone; a base that needs a hand after SIGKILL."""
    bank.append([1]), bank.append([2])
    rng = np.random.default_rng(5)
    for _ in range(2):
        process = child(bank.path)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
        process.wait()
        again = MemoryBank.open(bank.path, model)
        n = int(said[-1]) if said and said[-1].isdigit() else 0
        texts = [tokens.tolist() for tokens in again.references]
        if n:
            assert texts[3] in ([n % 37, 2, 1], [(n + 1) % 37, 2, 1])
        live = again.live()
        assert right(again.recall(live), model, again.references, live)
        assert again.write(progress=False) == 0


# -- Several processes


def test_a_fork_reads_on(bank, model):
    """Threads that a forked child has not; a connection that SQLite forbids to carry over."""
    want = bank.recall([3, 9, 11]).kv.clone()
    bank.cache.clear()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            same = torch.equal(bank.recall([3, 9, 11]).kv, want)
            bank.append([1, 2, 3])
            code = 0 if same else 2
        finally:
            os._exit(code)
    deadline = time.time() + 120
    while time.time() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the child hangs")
    assert status == 0 and len(bank) == N + 1
    assert right(bank.recall([N]), model, bank.references, [N])


def test_waiting_is_said_and_ends(bank, model, monkeypatch, capsys):
    """A process that hangs for ever, and says nothing, behind one that is stopped."""
    monkeypatch.setattr(bank_module, "WAIT", 2)
    other = sqlite3.connect(bank.references.file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.time()
    with pytest.raises(UserError, match="another process has been changing it for 2 s"):
        with bank.references.transaction(2):
            pass
    assert 1.5 < time.time() - began < 60
    assert "waiting for up to 2 s" in capsys.readouterr().err
    assert MemoryBank.open(bank.path, model).recall([2, 3]).count.min() > 0  # readers go on
    flip(bank.path / "memories.bin", 2 * bank.store.stride)
    asks = MemoryBank.open(bank.path, model, cache=0)
    assert right(asks.recall([2]), model, bank.references, [2])  # encoded, but not kept
    assert asks.verify() == [2]
    other.execute("ROLLBACK")
    asks.recall([2])
    assert asks.verify() == []


def test_a_medium_that_can_only_be_read(tmp_path, bank, model, monkeypatch):
    """A base on a CD that nobody can ask; a change that is half made there."""
    bank.references.connection.close()
    before = files(bank.path)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    for m in (None, model):
        reader = MemoryBank.open(bank.path, m)
        assert right(reader.recall(range(N)), model, reader.references, range(N))
        with pytest.raises(UserError, match="can only be read: copy it"):
            reader.append([1])
        with pytest.raises(UserError, match="can only be read: copy it"):
            reader.delete(2)
    # where others may write, who only reads sees it
    reader = MemoryBank.open(bank.path, model)
    monkeypatch.undo()
    other = MemoryBank.open(bank.path, model)
    other.delete(4)
    other.append([5, 7])
    assert len(reader) == N + 1 and reader.recall([4]).count.tolist() == [0]
    assert reader.references[N].tolist() == [5, 7]
    other.references.connection.close()
    before = files(bank.path)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    (bank.path / "memories.bin").unlink()
    reader = MemoryBank.open(bank.path, model)  # encoded for this answer
    assert right(reader.recall([2, 1]), model, reader.references, [2, 1]) and reader.encoded == 2
    assert not (bank.path / "memories.bin").exists()
    assert {k: v for k, v in before.items() if k != "memories.bin"} == files(bank.path)


# -- Damage


def test_a_record_vouches_for_what_it_is(bank, model):
    """Damage that a checksum misses: two sign bits, blocks that changed places, the record of
    another row or of another text."""
    stride = bank.store.stride
    whole = (bank.path / "memories.bin").read_bytes()
    records = [whole[i * stride : (i + 1) * stride] for i in range(N)]
    half = stride // 2
    signs = bytearray(records[6])
    signs[101] ^= 128
    signs[103] ^= 128
    for damaged in (
        records[9],
        records[6][half:] + records[6][:half],
        records[6][:-1] + b"x",
        records[6][:-6] + b"x" + records[6][-5:],
        records[6][:512] + bytes(512) + records[6][1024:],
        bytes(signs),
        bytes(stride),
    ):
        assert len(damaged) == stride and damaged != records[6]
        os.pwrite(bank.store.fd, damaged, 6 * stride)
        reader = MemoryBank.open(bank.path)
        assert reader.verify() == [6]
        for _ in range(2):  # and it is tried once
            with pytest.raises(UserError, match="reference 6 is missing or damaged"):
                reader.recall([5, 6, 7])
        assert right(
            MemoryBank.open(bank.path, model).recall([5, 6]), model, bank.references, [5, 6]
        )
        assert reader.verify() == []  # healed
    os.truncate(bank.path / "memories.bin", 9 * stride + 17)  # a cut copy
    assert MemoryBank.open(bank.path).verify() == list(range(9, N))
    assert bank.write(progress=False) == N - 9


def test_one_flipped_bit_of_the_texts_is_never_read(tmp_path, bank):
    """Another text, another state or another source, silently: SQLite itself checks none of it."""
    bank.references.run("PRAGMA wal_checkpoint(TRUNCATE)")
    old = [tokens.tolist() for tokens in bank.references]
    sources = bank.references.sources()
    size = bank.references.file.stat().st_size
    rng = np.random.default_rng(7)
    refused = 0
    for n in range(60):
        here = tmp_path / f"{n}"
        shutil.copytree(bank.path, here)
        flip(here / "texts.sqlite", int(rng.integers(size)))
        try:
            reader = MemoryBank.open(here)
            assert [tokens.tolist() for tokens in reader.references] == old
            assert reader.references.sources() == sources
            live = reader.live()
            assert live.tolist() == list(range(N))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(here) in str(error)
        shutil.rmtree(here)
    assert refused


def test_hostile_sizes_are_refused(tmp_path, bank):
    """A shape in a file of unknown origin that asks for terabytes, or a path that leaves it."""
    for changes in (dict(shape=[2, 2, 3, 1 << 19, 1 << 19]), dict(shape=[]), dict(dtype="save")):
        meta = dict(bank.meta, **changes)
        meta.pop("format")
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        meta.pop("id")
        Texts.create(folder, meta, [[1]])
        with pytest.raises(UserError, match="are none of ours"):
            MemoryBank.open(folder)
    for blob in (b"", b"SQLite format 3\0" + bytes(200), b"x" * 5000):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "texts.sqlite").write_bytes(blob)
        with pytest.raises(UserError, match="texts.sqlite"):
            MemoryBank.open(folder)


def test_a_full_disk(bank, monkeypatch):
    """A traceback or a signal in the middle of a change; a record called whole that is not."""

    def full(fd, parts, offset):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "pwritev", full)
        with pytest.raises(UserError, match="memories.bin: No space left"):
            bank.append([1, 2, 3])
    assert bank.verify() == [N] and bank.write(progress=False) == 1


def test_weights_that_are_damaged_write_nothing(bank, monkeypatch):
    """Memories of NaN that verify() approves."""
    broken = build()
    broken.blocks[1].norm1.weight.data[3] = float("nan")
    monkeypatch.setattr(broken, "fingerprint", lambda: bank.meta["fingerprint"])
    worse = MemoryBank.open(bank.path, broken)
    with pytest.raises(UserError, match="NaN or infinity: the model's weights are damaged"):
        worse.append([1, 2, 3])
    assert bank.verify() == [N]


# -- Codes


def test_quantized_memories(bank, model):
    """Codes of other rows than the memories; a codec trained on empty slots, or on keys alone."""
    seen = []
    train = Codec.train

    def spy(vectors, spec):
        seen.append(vectors)
        return train(vectors, spec)

    bank.delete(4)
    live = bank.live()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Codec, "train", spy)
        codes = bank.quantize(SPEC, progress=False)
    pool = bank.recall(live)
    pairs = zip(pool.kv, pool.count.tolist(), strict=True)
    want = torch.cat([kv[..., :n, :].flatten(0, -2) for kv, n in pairs])
    assert sorted(seen[0].tolist()) == sorted(want.tolist())
    assert codes.record_bytes == 2 * 2 * 3 * S * codes.codec.bytes and codes.verify() == []
    ids = [22, 0, 7, 1, 0]
    x, y = bank.recall(ids), MemoryBank.open(bank.path, codes=True).recall(ids)
    assert y.kv.dtype == torch.float32 and torch.equal(x.count, y.count)
    assert torch.equal(y.kv, codes.codec.decode(codes.codec.encode(x.kv)))
    raw = codes.recall(ids, decode=False)
    assert raw.kv.dtype == torch.uint8 and torch.equal(codes.codec.decode(raw.kv), y.kv)
    # a bank like another: facts are added to it and deleted from it, damage is healed
    i = bank.append([6, 1, 8, 0, 3])
    assert MemoryBank.open(bank.path, codes=True).recall([i]).count.tolist() == [5]
    flip(bank.path / "codes" / "codes.bin", 7 * codes.store.stride + 1)
    assert codes.verify() == [7] and codes.write(progress=False) == 1
    assert torch.equal(
        codes.recall([7]).kv, codes.codec.decode(codes.codec.encode(bank.recall([7]).kv))
    )
    assert bank.quantize(progress=False).verify() == []
    with pytest.raises(UserError, match=f"has codec {SPEC}: drop --codec"):
        bank.quantize("Residual2x5,PQ5x5", progress=False)
    with pytest.raises(UserError, match="quantized memories already"):
        codes.quantize()


def test_quantize_killed(bank, monkeypatch):
    """Half of the codes that nobody completes."""
    calls, encode = itertools.count(), Codec.encode
    with pytest.raises(UserError, match="no quantized memories; make them with.*--quantize"):
        MemoryBank.open(bank.path, codes=True)

    def dies(self, x):
        if next(calls) == 2:
            raise Killed
        return encode(self, x)

    with monkeypatch.context() as m:
        m.setattr(Codec, "encode", dies)
        with pytest.raises(Killed):
            bank.quantize(SPEC, progress=False)
    left = MemoryBank.open(bank.path, codes=True).verify()
    assert 0 < len(left) < N
    again = MemoryBank.open(bank.path, build())
    assert again.quantize(progress=False).verify() == []
    # codes of another codec are missing, not misread
    Codec.train(torch.randn(701, 10), SPEC).save(bank.path / "codes")
    assert MemoryBank.open(bank.path, codes=True).verify() == list(range(N))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu(tmp_path, references):
    """A pinned buffer reused before it was copied; codes decoded on the wrong device."""
    model = build().cuda()
    bank = MemoryBank.create(tmp_path / "bank", model, references)
    assert bank.write(progress=False) == N
    cpu = MemoryBank.open(tmp_path / "bank")
    for ids in ([3, 1, 3], range(N), [7, 22]):
        pool = bank.recall(list(ids))
        assert pool.kv.is_cuda and pool.count.is_cuda
        assert torch.equal(pool.kv.cpu(), cpu.recall(list(ids)).kv)
