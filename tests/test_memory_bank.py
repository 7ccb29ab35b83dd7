"""The bank on disk: what it returns, what a kill or damage leaves, what it refuses. Odd sizes."""

import doctest
import hashlib
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch

import bank as bank_module
import common
import corpus
import memory
from bank import MemoryBank
from common import UserError
from model import Config, Memory3
from quantize import Codec

N, V, S = 23, 37, 5
CONFIG = dict(
    n_layer=3,
    n_memory_layer=2,
    n_head=6,
    n_kv_head=3,
    head_dim=10,
    mlp_width=22,
    vocab_size=V,
    memory_tokens=S,
    ref_len=13,
    header=(1, 2, 3),
)
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


@pytest.fixture
def references(tmp_path):
    r = np.random.default_rng(2)
    lengths = [1, 3, *r.integers(1, 14, N - 3), 13]  # shorter than S, and the longest
    rows = [r.integers(0, V, n).tolist() for n in lengths]
    common.write_json(tmp_path / "meta.json", dict(n_vocab=V, tokenizer_id="tiny:1"))
    return corpus.References.create(tmp_path / "kb", rows, V)


@pytest.fixture(autouse=True)
def small_window(monkeypatch):
    """Three windows and more wherever a whole bank is read."""
    monkeypatch.setattr(bank_module, "WINDOW", 7 * 2 * 2 * 3 * S * 10 * 2)


@pytest.fixture
def bank(tmp_path, model, references):
    bank = MemoryBank.create(tmp_path / "bank", model, references)
    assert bank.write(batch=4, progress=False) == N
    return bank


def written(model, references, ids):
    with torch.inference_mode():
        return memory.Memories.cat([model.write(references.batch([i])) for i in ids])


def equal(pool, model, references, ids, dtype=torch.bfloat16):
    want = written(model, references, ids)
    return torch.equal(pool.kv, want.kv.to(dtype)) and torch.equal(pool.count, want.count)


def close(pool, model, references, ids):
    """Sums come in another order in another batch, so memories agree to rounding only."""
    want = written(model, references, ids)
    near = torch.allclose(pool.kv.float(), want.kv, rtol=1e-2, atol=1e-2)
    return near and torch.equal(pool.count, want.count)


def files(path):
    return {
        f.name: (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns)
        for f in path.iterdir()
    }


def poke(path, at, value=None):
    """Another byte at one place of a file."""
    with open(path, "r+b") as f:
        f.seek(at)
        old = f.read(1)[0]
        f.seek(at)
        f.write(bytes([old ^ 64 if value is None else value]))


def test_docstrings():
    """A worked example that its function no longer gives."""
    found = doctest.testmod(memory, extraglobs=dict(np=np, torch=torch))
    assert found.attempted >= 3 and not found.failed


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
            assert close(pool, model, references, ids)
    assert again.recall([0, 1]).count.tolist() == [1, 3] and pool.count.dtype == torch.int64
    for nothing in ([], np.zeros(0, int)):
        assert again.recall(nothing).kv.shape == (0, 2, 2, 3, S, 10)


def test_same_bytes_in_any_batch(tmp_path, model, references, bank):
    """Padding or neighbours in a batch that decide which of two equal tokens is kept."""
    for batch in (1, 3, 64):
        other = MemoryBank.create(tmp_path / f"{batch}", model, references)
        other.write(batch, progress=False)
        for name in bank_module.files(0):
            assert (other.path / name).read_bytes() == (bank.path / name).read_bytes()
    cold = MemoryBank.create(tmp_path / "cold", model, references)
    for ids in ([3, 9, 4], [22, 0], list(range(N))):
        assert equal(cold.recall(ids), model, references, ids)
    assert (cold.path / "memories.bin").read_bytes() == (bank.path / "memories.bin").read_bytes()


@pytest.mark.parametrize("size", [8192 * 3, 8168 * 2, 480, 4 * 2100 + 4, 106, 77])
def test_checksum(size):
    """A real checksum of 0 taken for "not written", so that one record is written forever; a bit,
    a count, a page of zeros, or two parts that changed places, unseen. Words of 8, 4, 2, 1 bytes,
    with whole rows of columns, with a rest, with the rest alone."""
    rows = np.random.default_rng(3).integers(0, 256, (2, size), np.uint8)
    row, want = rows[0], bank_module.checksum(rows[0], 3)
    assert bank_module.checksum(np.zeros(size, np.uint8), 0) == 1 and 0 < want < 1 << 32
    assert bank_module.checksum(row.copy(), np.uint8(3)) == want  # as both ways to call it give it
    assert want not in [bank_module.checksum(row, n) for n in (0, 2, 4, 255)]
    assert bank_module.checksum(rows[1], 3) != want
    step = 7 if size > 500 else 1
    for bit in range(0, 8 * size, step):
        row[bit // 8] ^= 1 << bit % 8
        assert bank_module.checksum(row, 3) != want, bit
        row[bit // 8] ^= 1 << bit % 8
    part = 4096 if size > 9000 else 16
    parts = row[: size // part * part].reshape(-1, part)
    for a, b in itertools.combinations(range(len(parts)), 2):
        moved = parts.copy()
        moved[[a, b]] = parts[[b, a]]
        moved = np.concatenate([moved.ravel(), row[parts.size :]])
        assert bank_module.checksum(moved, 3) != want, (a, b)
    for a in range(len(parts)):
        less = row.copy()
        less[a * part : (a + 1) * part] = 0
        assert bank_module.checksum(less, 3) != want, a


def test_training_vectors(tmp_path, model, references, bank, monkeypatch):
    """A codec trained on the zeros of empty slots, or on keys alone."""
    seen, train = [], Codec.train
    monkeypatch.setattr(Codec, "train", lambda x, spec: seen.append(x) or train(x, spec))
    bank.quantize(tmp_path / "codes", spec=SPEC, progress=False)
    pool = bank.recall(list(range(N)))
    pairs = zip(pool.kv, pool.count, strict=True)
    want = torch.cat([kv[..., :n, :].flatten(0, -2) for kv, n in pairs])
    assert sorted(seen[0].tolist()) == sorted(want.tolist())


def test_create_is_sparse_and_says_whose(tmp_path, model, references):
    """A terabyte of zeros written at creation; a meta.json that does not tell what it is of."""
    bank = MemoryBank.create(tmp_path / "a" / "bank", model, references)
    stat = (bank.path / "memories.bin").stat()
    assert stat.st_size == N * bank.record_bytes and stat.st_blocks == 0
    meta = json.loads((bank.path / "meta.json").read_text())
    assert meta["fingerprint"] == model.fingerprint() and meta["n"] == N
    assert meta["tokenizer"] == "tiny:1" and meta["references_hash"] == [references.hash]
    assert meta["shape"] == [2, 2, 3, S, 10] and len(bank) == N
    assert bank.verify() == list(range(N))


def test_resumes_after_an_exception(tmp_path, model, references, bank, monkeypatch):
    """Records written twice or never; a bank that differs from one written in one go."""
    other = MemoryBank.create(tmp_path / "other", model, references)
    calls, write = itertools.count(), model.write
    monkeypatch.setattr(model, "write", lambda r: write(r) if next(calls) < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.write(batch=2, progress=False)
    monkeypatch.setattr(model, "write", write)
    other = MemoryBank.open(tmp_path / "other", model)
    left = other.verify()
    assert 0 < len(left) < N
    assert other.write(batch=3, progress=False) == len(left)
    for name in bank_module.files(0):
        assert (other.path / name).read_bytes() == (bank.path / name).read_bytes()


@pytest.mark.parametrize("at", range(0, 60, 7))
def test_resumes_after_a_kill_at_any_write(tmp_path, model, references, bank, monkeypatch, at):
    """A checksum that vouches for a record which is not there, or only half."""
    other = MemoryBank.create(tmp_path / "other", model, references)
    calls, pwrite, checksum = itertools.count(), os.pwrite, bank_module.checksum

    def killed_pwrite(fd, data, offset):
        if next(calls) == at:
            pwrite(fd, bytes(memoryview(data).cast("B")[:11]), offset)
            raise Killed
        return pwrite(fd, data, offset)

    def killed_checksum(*a):
        if next(calls) == at:
            raise Killed
        return checksum(*a)

    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", killed_pwrite)
        m.setattr(bank_module, "checksum", killed_checksum)
        try:
            other.write(batch=3, progress=False)
        except Killed:
            pass
    reader = MemoryBank.open(tmp_path / "other")
    bad = reader.verify()
    whole = [i for i in range(N) if i not in bad]
    assert not whole or equal(reader.recall(whole), model, references, whole)
    MemoryBank.open(tmp_path / "other", model).write(progress=False)
    for name in bank_module.files(0):
        assert (other.path / name).read_bytes() == (bank.path / name).read_bytes()


def test_damage_is_found_and_healed(model, references, bank, capsys):
    """A flipped bit in a record, a count, a checksum, or a count that says deleted, read anyway."""
    want = (bank.path / "memories.bin").read_bytes()
    for name, at, bad in [
        ("memories.bin", 6 * bank.record_bytes + 17, 6),
        ("memories.bin", N * bank.record_bytes - 1, 22),
        ("count.bin", 2, 2),
        ("crc.bin", 4 * 11 + 3, 11),
    ]:
        poke(bank.path / name, at)
        assert MemoryBank.open(bank.path).verify() == [bad]
        with pytest.raises(ValueError, match=f"reference {bad} is missing or damaged; open"):
            MemoryBank.open(bank.path).recall([1, bad, 3])
        fresh = MemoryBank.open(bank.path, model)
        assert equal(fresh.recall([bad, 3, bad]), model, references, [bad, 3, bad])
        assert fresh.encoded == 1 and "cold start" in capsys.readouterr().out
        fresh.recall([bad])
        assert fresh.encoded == 1 and "cold start" not in capsys.readouterr().out
        assert fresh.verify() == [] and (bank.path / "memories.bin").read_bytes() == want
    poke(bank.path / "count.bin", 4, 255)  # no deletion: its checksum is still there
    assert MemoryBank.open(bank.path).verify() == [4]
    assert MemoryBank.open(bank.path, model).write(progress=False) == 1


def test_reading_changes_nothing(model, bank):
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


def test_every_read_is_checked(model, references, bank, monkeypatch):
    """A record, whole when it was read before, taken for whole now: another process has changed it
    or is about to, or the drive has lost a page of it, or a copy has put it in another's place."""
    reader, ids = MemoryBank.open(bank.path, None, references, cache=0), [5, 6, 7]
    assert equal(reader.recall(ids), model, references, ids)
    bank.replace(6, [8] * 13)
    assert equal(reader.recall(ids), model, references, ids)

    def refused(i):
        assert reader.verify() == [i]
        for _ in range(2):
            with pytest.raises(ValueError, match=f"reference {i} is missing or damaged"):
                reader.recall(ids)

    poke(bank.path / "crc.bin", 4 * 5)
    refused(5)
    poke(bank.path / "crc.bin", 4 * 5)
    whole = (bank.path / "memories.bin").read_bytes()
    size = bank.record_bytes
    records = [whole[i * size : (i + 1) * size] for i in range(N)]
    half = size // 2
    for damaged in (
        records[9],
        records[6][half:] + records[6][:half],
        records[6][:-1] + b"x",
        records[6][:512] + bytes(512) + records[6][1024:],
    ):
        assert len(damaged) == size and damaged != records[6]
        os.pwrite(bank.file.fileno(), damaged, 6 * size)
        refused(6)
    os.pwrite(bank.file.fileno(), records[6], 6 * size)
    assert equal(reader.recall(ids), model, references, ids)
    checksum = bank_module.checksum  # a change that begins while the record is read

    def begin(*given):
        bank.crc[6] = 0
        return checksum(*given)

    with monkeypatch.context() as m:
        m.setattr(bank_module, "checksum", begin)
        with pytest.raises(ValueError, match="reference 6 is missing or damaged"):
            reader.recall([6])
    refused(6)


def test_rounded_weights_read_and_heal_their_bank(references, bank):
    """A bank that generation in bfloat16 can no longer open, or adds nothing to."""
    poke(bank.path / "memories.bin", 6 * bank.record_bytes + 17)
    half = MemoryBank.open(bank.path, build().rounded(torch.bfloat16), references)
    healed, want = half.recall([6, 3]), bank.recall([3]).kv
    assert half.encoded == 1 and half.verify() == [] and torch.equal(healed.kv[1:], want)


@pytest.mark.parametrize("cache", [0, 2, 1024])
def test_a_pool_stays_as_it_was(bank, model, references, cache):
    """The memory of a pool in use that the next recall reads into; one that is never used again."""
    bank = MemoryBank.open(bank.path, cache=cache)
    pools = [(ids, bank.recall(ids)) for ids in ([3, 9], [9, 4], [1, 2, 3], [3, 9], [4, 1])]
    for ids, pool in pools:
        assert equal(pool, model, references, ids)
    bank, places = MemoryBank.open(bank.path, cache=0), set()
    for ids in ([3, 9], [4, 5], [1, 2], [7]):
        pool = bank.recall(ids)
        part = pool.kv[:, 1]  # a view is use, too
        places.add(pool.kv.data_ptr())
        del pool, part
    assert len(places) == 1


def test_cache(model, bank):
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
    assert bank.stats() == (
        "cache of 3 memories: 3 hits, 9 misses, 0 of them encoded at their first retrieval"
    )
    none = MemoryBank.open(bank.path, cache=0)
    assert torch.equal(none.recall([2, 2]).kv, none.recall([2, 2]).kv) and none.misses == 2


def test_append_replace_delete(model, references, bank):
    """A text whose memory is another's; a cache that remembers the old text; ids that move."""
    untouched = [i for i in range(N) if i != 6]
    bank.recall([6])
    assert bank.append([5, 6, 7]) == N and bank.replace(6, [8] * 13) == 6
    assert bank.append(torch.tensor([9]).numpy()) == N + 1
    again = MemoryBank.open(bank.path)
    assert len(again) == len(bank) == N + 2 and again.meta["n"] == N + 2
    assert again.references[N].tolist() == [5, 6, 7] and again.references[6].tolist() == [8] * 13
    for b in (bank, again):
        assert b.verify() == []
        for ids in ([6, N + 1, N], untouched):
            assert equal(b.recall(ids), model, references, ids)
    bank.delete(4)
    again = MemoryBank.open(bank.path, model)
    for b in (bank, again):
        with pytest.raises(ValueError, match="4 was deleted"):
            b.recall([3, 4])
        assert b.verify() == [] and b.write(progress=False) == 0 and 4 not in b.live()
    at = 4 * bank.record_bytes
    assert not any((bank.path / "memories.bin").read_bytes()[at : at + bank.record_bytes])
    assert len(again.references[4])  # the row stays
    again.replace(4, [11, 12])
    assert equal(again.recall([4, 5]), model, again.references, [4, 5])


def test_a_kill_during_a_deletion(model, references, bank, monkeypatch):
    """A record called deleted whose numbers are still on the disk."""
    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bank.delete(4)
    again = MemoryBank.open(bank.path, model)
    assert again.verify() == [4] and 4 in again.live()
    assert equal(again.recall([4, 3]), model, references, [4, 3])


@pytest.mark.parametrize("change", ["append", "replace", "revive"])
def test_a_kill_during_a_change(tmp_path, model, references, bank, monkeypatch, change):
    """The new text with the old memory, or a bank that a kill makes useless."""
    if change == "revive":
        bank.delete(8)
    old = [references[i].tolist() for i in range(N)]
    i, new = (N, [5, 4, 3]) if change == "append" else (8, [7] * len(old[8]))
    keep = tmp_path / "keep"
    shutil.copytree(tmp_path, keep, ignore=lambda *_: ["keep"])
    outcomes = set()
    for at in itertools.count():
        here = tmp_path / f"{at}"
        shutil.copytree(keep, here)
        refs = corpus.References.open(here / "kb")
        victim, calls = MemoryBank.open(here / "bank", model, refs), itertools.count()

        def mortal(function, at=at, calls=calls):
            def call(*args, **kwargs):
                if next(calls) == at:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as m:
            for module, name in [
                (os, "replace"),
                (os, "truncate"),
                (os, "pwrite"),
                (bank_module, "checksum"),
                (model, "write"),
            ]:
                m.setattr(module, name, mortal(getattr(module, name)))
            try:
                victim.replace(i, new)
                break  # this time nothing was in the way
            except Killed:
                pass
        refs = corpus.References.open(here / "kb")
        reader = MemoryBank.open(here / "bank", None, refs)
        bad = reader.verify()
        assert set(bad) <= {i}
        reopened = MemoryBank.open(here / "bank", model, refs)
        rows = [refs[j].tolist() for j in range(len(refs))]
        after = old + [new] if change == "append" else old[:i] + [new] + old[i + 1 :]
        assert rows in (old, after)
        ids = [j for j in range(len(refs)) if change != "revive" or j != 8]
        assert equal(reopened.recall(ids), model, refs, ids)
        if change == "revive":
            try:
                pool = reopened.recall([8])
            except ValueError as e:
                assert "8 was deleted" in str(e)
            else:  # alive again: then with the new text
                assert rows == after
                assert torch.equal(pool.kv, written(model, refs, [8]).kv.bfloat16())
        outcomes.add((rows == after, bool(bad)))
        assert reopened.meta["references_hash"] == [refs.hash] and reopened.meta["n"] == len(refs)
        reopened.replace(8, [1, 2])  # and life goes on
        assert equal(reopened.recall([8]), model, refs, [8])
    assert at >= 8 and {new for new, _ in outcomes} == {False, True}


def test_a_kill_between_the_files_of_the_text(model, references, bank, monkeypatch):
    """New tokens under old offsets: every reference behind the change is shifted."""
    replace = os.replace
    with monkeypatch.context() as m:
        m.setattr(os, "replace", lambda a, b: 1 / 0 if str(b).endswith(".idx") else replace(a, b))
        with pytest.raises(ZeroDivisionError):
            bank.replace(8, [7] * 13 if len(references[8]) != 13 else [7])
    with pytest.raises(ValueError, match="kb"):
        MemoryBank.open(bank.path, model)


def test_refuses_what_is_no_bank(tmp_path, model, references, bank):
    """A page of KeyError; a directory of something else filled with our files."""
    with pytest.raises(UserError, match=r"meta.json is missing.*python write.py --out"):
        MemoryBank.open(tmp_path / "nowhere")
    for text in ("", "{", "[1]", '{"n": 3}', '{"format": ["memory3 bank", 99]}'):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        for name in bank_module.files(0):
            (other / name).touch()
        (other / "meta.json").write_text(text)
        with pytest.raises(ValueError, match="version 2: give another path"):
            MemoryBank.open(other)
    with pytest.raises(ValueError, match="not of a memory bank"):
        MemoryBank.create(tmp_path, model, references)  # a data directory
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("three years")
    for path in (tmp_path / "full", tmp_path / "kb.bin"):
        with pytest.raises((ValueError, OSError)) as e:
            MemoryBank.create(path, model, references)
        assert "something else" in str(e.value)
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    for name in ("crc.bin", "memories.bin", "meta.json"):
        (bank.path / name).rename(tmp_path / "x")
        with pytest.raises((FileNotFoundError, ValueError), match=f"{name} is missing"):
            MemoryBank.open(bank.path)
        (tmp_path / "x").rename(bank.path / name)


def test_create_again(tmp_path, model, references, bank):
    """A complete bank emptied by a second `write.py`; one that a kill left without meta.json."""
    before = files(bank.path)
    again = MemoryBank.create(bank.path, model, references)
    assert again.verify() == [] and files(bank.path) == before
    with pytest.raises(ValueError, match="is a bank of bfloat16, not of float32"):
        MemoryBank.create(bank.path, model, references, "float32")
    with pytest.raises(ValueError, match="dtype float16"):
        MemoryBank.create(bank.path, model, references, "float16")
    (bank.path / "meta.json").unlink()  # the last file that creation makes
    assert MemoryBank.create(bank.path, model, references).verify() == list(range(N))


@pytest.mark.parametrize("name", ["memories.bin", "count.bin", "crc.bin"])
def test_refuses_a_cut_off_bank(model, bank, name):
    """The missing end of a copied file read as zeros, or healed without a word."""
    os.truncate(bank.path / name, (bank.path / name).stat().st_size - 1)
    for m in (None, model):
        with pytest.raises(ValueError, match=f"{name} is missing or cut off"):
            MemoryBank.open(bank.path, m)


def test_refuses_another_models_memories(bank, references):
    """Remark A.1: after an update of the weights the memories are not readable, but look so."""
    other = build(seed=3)
    for attempt in (MemoryBank.open, lambda p, m: MemoryBank.create(p, m, references)):
        with pytest.raises(ValueError) as e:
            attempt(bank.path, other)
        line = str(e.value)
        assert "\n" not in line and "write.py" in line
        assert other.fingerprint() in line and bank.meta["fingerprint"] in line


def test_refuses_changed_text(tmp_path, model, references, bank):
    """References prepared anew, with the old memories behind their ids."""
    references.replace(3, [1, 2, 3])
    for m in (None, model):
        with pytest.raises(ValueError, match="is not the text that .*bank was written from"):
            MemoryBank.open(bank.path, m)
    os.remove(tmp_path / "kb.idx")
    with pytest.raises(UserError, match="kb.idx is missing"):
        MemoryBank.open(bank.path)


def test_bad_input(tmp_path, model, references, bank):
    """-1 that reads the last memory; a text cut to ref_len, or its tokens modulo 65,536."""
    for ids in ([0, N], [-1, 3]):
        with pytest.raises(ValueError, match="references 0 to 22, and no"):
            bank.recall(ids)
    for ids in ([[1, 2]], [0.5], 3):
        with pytest.raises(ValueError, match="a row of integers"):
            bank.recall(ids)
    before = references.hash
    for tokens, line in [
        ([], "1 to 13 tokens"),
        ([1] * 14, "1 to 13"),
        ([V], "0 to 36"),
        ([-1], "0 to 36"),
        ([0.5], "0 to 36"),
        ([65537], "0 to 36"),
    ]:
        for change in (bank.append, lambda t: bank.replace(2, t)):
            with pytest.raises(ValueError, match=line):
                change(tokens)
    for i in (-1, N + 1):
        with pytest.raises(ValueError, match="and no "):
            bank.replace(i, [1])
        with pytest.raises(ValueError, match="and no "):
            bank.delete(i)
    reader = MemoryBank.open(bank.path)
    for change in (lambda: reader.append([1]), lambda: reader.delete(2), reader.write):
        with pytest.raises(ValueError, match="open it with its model"):
            change()
    assert references.hash == before and len(bank) == N and bank.verify() == []
    long = corpus.References.create(tmp_path / "long", [[1], [2] * 14], V)
    with pytest.raises(ValueError, match="14 tokens"):
        MemoryBank.create(tmp_path / "no", model, long)
    many = corpus.References.create(tmp_path / "many", [[1], [V]], V + 1)
    with pytest.raises(ValueError, match="vocabulary of 38"):
        MemoryBank.create(tmp_path / "no", model, many)
    assert not (tmp_path / "no").exists()


def test_quantized_bank(tmp_path, model, references, bank):
    """Codes of other rows than the memories; a deleted fact that comes back."""
    bank.delete(4)
    codes = bank.quantize(tmp_path / "codes", spec=SPEC, progress=False)
    assert codes.record_bytes == 2 * 2 * 3 * S * codes.codec.bytes
    assert (tmp_path / "codes" / "memories.bin").stat().st_size == N * codes.record_bytes
    assert codes.verify() == [] and not (tmp_path / "codes.new").exists()
    ids = [22, 0, 7, 1, 0]
    x, y = bank.recall(ids), MemoryBank.open(tmp_path / "codes").recall(ids)
    assert y.kv.dtype == torch.float32 and torch.equal(x.count, y.count)
    filled = (torch.arange(S) < x.count[:, None])[:, None, None, None, :, None]
    assert torch.equal(y.kv, codes.codec.decode(codes.codec.encode(x.kv)))
    assert ((y.kv - x.kv) * filled).norm() < 0.5 * x.kv.float().norm()
    with pytest.raises(ValueError, match="4 was deleted"):
        codes.recall([4])
    raw = codes.recall(ids, decode=False)
    assert raw.kv.dtype == torch.uint8 and torch.equal(raw.count, y.count)
    assert torch.equal(codes.codec.decode(raw.kv), y.kv)
    before = files(tmp_path / "codes")
    assert codes.write(progress=False) == 0 and files(tmp_path / "codes") == before
    poke(tmp_path / "codes" / "memories.bin", 7 * codes.record_bytes + 1)
    assert codes.verify() == [7]
    assert codes.write(progress=False) == 1  # from the model, through the codec
    assert files(tmp_path / "codes")["memories.bin"][0] == before["memories.bin"][0]


def test_quantize_again(tmp_path, model, references, bank):
    """The same seed with another codec; what a kill left in the way; a cold start of codes."""
    a = bank.quantize(tmp_path / "a", spec=SPEC, progress=False)
    (tmp_path / "b.new").mkdir()
    (tmp_path / "b.new" / "meta.json").write_text("{")
    b = bank.quantize(tmp_path / "b", spec=SPEC, progress=False)
    assert a.meta["codec"] == b.meta["codec"] and a.meta["fingerprint"] == model.fingerprint()
    codec = Codec.load(tmp_path / "a")
    cold = MemoryBank.create(tmp_path / "d", model, references, codec=codec)
    assert len(cold.verify()) == N
    for other in (b, cold):
        assert torch.equal(other.recall([3, 21, 0]).kv, a.recall([3, 21, 0]).kv)
    assert MemoryBank.create(tmp_path / "d", model, references, codec=codec).codec
    with pytest.raises(ValueError, match="is a bank of Residual2x6,PQ5x6:.*not of bfloat16"):
        MemoryBank.create(tmp_path / "d", model, references)


def test_quantize_refuses(tmp_path, model, references, bank):
    """Missing memories quantized as zeros; another bank overwritten; a codec that was swapped."""
    want = (bank.path / "memories.bin").read_bytes()
    codes = bank.quantize(tmp_path / "codes", spec=SPEC, progress=False)
    with pytest.raises(ValueError, match="quantized already"):
        codes.quantize(tmp_path / "twice")
    with pytest.raises(ValueError, match="exists: give another"):
        bank.quantize(tmp_path / "codes", spec=SPEC)
    poke(bank.path / "memories.bin", 3)
    with pytest.raises(ValueError, match="reading only; open it with its model"):
        MemoryBank.open(bank.path).quantize(tmp_path / "no")
    bank = MemoryBank.open(bank.path, model)
    again = bank.quantize(tmp_path / "again", spec=SPEC, progress=False)  # makes what is missing
    assert torch.equal(again.recall([0, 1]).kv, codes.recall([0, 1]).kv)
    assert (bank.path / "memories.bin").read_bytes() == want
    other = Codec.train(torch.randn(701, 10), SPEC)
    other.save(tmp_path / "codes")
    with pytest.raises(ValueError, match="not of its codec.npz"):
        MemoryBank.open(tmp_path / "codes")
    assert not (tmp_path / "no").exists()


def test_quantize_killed(tmp_path, model, references, bank, monkeypatch):
    """Half a quantized bank under its final name."""
    calls, encode = itertools.count(), Codec.encode
    with monkeypatch.context() as m:
        m.setattr(Codec, "encode", lambda s, x: encode(s, x) if next(calls) < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bank.quantize(tmp_path / "codes", spec=SPEC, progress=False)
    assert not (tmp_path / "codes").exists()
    assert bank.quantize(tmp_path / "codes", spec=SPEC, progress=False).verify() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu(tmp_path, references):
    """A pinned buffer reused before it was copied; codes decoded on the wrong device."""
    model = build().cuda()
    bank = MemoryBank.create(tmp_path / "bank", model, references)
    assert bank.write(progress=False) == N
    cpu = MemoryBank.open(tmp_path / "bank", None, references)
    for ids in ([3, 1, 3], range(N), [7, 22]):
        pool = bank.recall(list(ids))
        assert pool.kv.is_cuda and pool.count.is_cuda
        assert torch.equal(pool.kv.cpu(), cpu.recall(list(ids)).kv)
    codes = bank.quantize(tmp_path / "codes", spec=SPEC, progress=False)
    y = codes.recall([4, 2])
    slow = MemoryBank.open(tmp_path / "codes").recall([4, 2])
    assert y.kv.is_cuda and torch.allclose(y.kv.cpu(), slow.kv, atol=1e-5)
