"""write.py from the command line to the bank, at tiny size."""

import argparse
import base64
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPE

import common
import corpus
import generate
import write
from bank import MemoryBank
from common import UserError
from memory import attention_path
from model import Config, Memory3, load_checkpoint, save_checkpoint
from retrieval import Live

TOKENIZER = dict(
    name="bytes",
    pattern=r"\w+|\W",
    prefix_space=False,
    ranks=[base64.b64encode(bytes([i])).decode() for i in range(256)],
)


@pytest.fixture
def place(tmp_path):
    """A data directory with 29 references, and a checkpoint for it."""
    common.write_json(tmp_path / "tokenizer.json", TOKENIZER)
    common.write_json(tmp_path / "meta.json", dict(n_vocab=257, tokenizer=str(tmp_path)))
    tokenizer = corpus.tokenizer(tmp_path)
    rows = [tokenizer.encode(f"City {i} has {i * i} people." * (1 + i % 2)) for i in range(29)]
    corpus.References.create(tmp_path / "kb", rows, 257)
    checkpoint(tmp_path / "toy", tuple(tokenizer.header))
    return tmp_path


def checkpoint(path, header, seed=1):
    torch.manual_seed(seed)
    config = Config(**SHAPE, vocab_size=263, memory_tokens=5, ref_len=59, header=header)
    path.mkdir(exist_ok=True)
    model = Memory3(config)
    save_checkpoint(path / "model.pt", model.state_dict(), dict(config=asdict(config)))
    return model


def run(place, *flags):
    args = ["--checkpoint", place / "toy", "--data", place, "--out", place / "out" / "kb.bank"]
    return write.main(write.command_line([str(a) for a in [*args, "--device", "cpu", *flags]]))


def test_texts_of_another_base(place):
    """Another model's memories of the same texts whose index or threshold is another one, so that
    other references are found, or some for a question that nothing is about; a changed base."""
    bank = run(place, "--embedder", "hash:97", "--factory", "SQ8")
    rows = [(f"How many people has City {i}?", i) for i in range(29)]
    Live.open(bank.references).calibrate(rows)
    learnt = (bank.path / "relevance.json").read_bytes()
    checkpoint(place / "toy", tuple(corpus.tokenizer(place).header), seed=2)
    for out, flags, chosen in (
        ("a", (), ("hash:97", "SQ8")),
        ("b", ("--embedder", "hash:93"), ("hash:93", "Flat")),
        ("c", ("--factory", "Flat"), ("hash:97", "Flat")),
    ):
        other = run(place, "--references", bank.path, "--out", place / out, *flags)
        assert len(other.references) == 29 and other.verify() == []
        live = Live.open(other.references)
        assert (live.meta["embedder"], live.meta["factory"]) == chosen
        assert (other.path / "relevance.json").read_bytes() == learnt and live.relevance
    assert Live.open(MemoryBank.open(bank.path).references).meta["embedder"] == "hash:97"


def test_writes_and_says_so(place, capsys):
    """A bank that is not complete; a second run that writes again; numbers that are not printed."""
    bank = run(place, "--batch", 7)
    assert bank.verify() == [] and bank.meta["tokenizer_id"] == corpus.tokenizer(place).id
    out = capsys.readouterr().out
    path = attention_path(torch.device("cpu"), torch.float32, 59 + len(bank.model.config.header))[0]
    assert f"device: cpu, torch.float32; attention: {path} (" in out
    assert f"29 memories of {2 * 2 * 3 * 5 * 10 * 2:,} bytes" in out and "34,800 bytes in" in out
    assert "29 written, " in out and "memories/s" in out
    assert "index: 29 references, hash:512" in out
    before = (bank.path / "memories.bin").stat().st_mtime_ns
    run(place)
    assert "complete, nothing to write" in capsys.readouterr().out
    assert (bank.path / "memories.bin").stat().st_mtime_ns == before
    os.truncate(bank.path / "memories.bin", 0)
    assert run(place).verify() == [] and "29 written" in capsys.readouterr().out


def test_a_base_needs_its_texts_no_more(place, capsys):
    """A knowledge base that a moved data set makes useless, or that write.py fills from another."""
    bank = run(place)
    bank.delete(3)
    i = bank.append([65, 66])
    os.truncate(bank.path / "memories.bin", 0)
    (place / "kb.bin").unlink()
    again = run(place)
    assert "28 written" not in capsys.readouterr().out.splitlines()[-2]
    assert again.verify() == [] and again.references[i].tolist() == [65, 66]
    assert Live.open(again.references).search(["City 7"], 1)[0].tolist() == [[7]]
    with pytest.raises(UserError, match="kb.bin is missing"):
        run(place, "--references", "kb")


def test_a_base_in_the_working_directory(place, monkeypatch):
    """The texts of a base that is called kb, like a data set's references, instead of these."""
    run(place, "--out", place / "elsewhere/kb")
    rows = [corpus.tokenizer(place).encode("Another text.")]
    corpus.References.create(place / "kb", rows, 257)
    monkeypatch.chdir(place / "elsewhere")
    assert len(run(place).references) == 1


def test_another_embedder(place, capsys):
    """--embedder or --factory that is swallowed because an index is there; the default, that undoes
    the choice; keys of the memories that do not follow a live change (Remark 3.1)."""
    run(place, "--embedder", "self:1.2")
    bank = run(place)
    assert "29 references, self:1.2:" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(UserError, match="give --checkpoint"):
        Live.open(bank.references)
    live = Live.open(bank.references, bank.model)
    questions = ["City 7 has", "Berlin"]
    before = live.search(questions, 29)
    assert set(before[0][0].tolist()) <= {*range(29), -1} and (before[0][:, 0] >= 0).all()
    bank.delete([before[0][0, 0]])
    [new] = bank.add([corpus.tokenizer(place).encode("Berlin has 3644826 people.")])
    ids = live.search(questions, 30)[0]
    assert before[0][0, 0] not in ids and new in ids[1]
    live.save()
    again = Live.open(bank.references, bank.model)
    assert np.array_equal(again.search(questions, 30)[0], ids)
    assert run(place, "--embedder", "hash:67", "--factory", "SQ8")
    assert ", hash:67:3:" in capsys.readouterr().out.splitlines()[-1]
    run(place, "--factory", "Flat")
    assert capsys.readouterr().out.splitlines()[-1].endswith(", Flat")


def test_quantizes(place, capsys):
    """--quantize without a codec's name and error; trained again each time."""
    flags = ["--quantize", "--codec", "Residual2x6,PQ5x6"]
    bank = run(place, *flags)
    out = capsys.readouterr().out
    assert "quantized in" in out and "Residual2x6,PQ5x6, 360 bytes a memory, 3.3 times" in out
    codes = MemoryBank.open(bank.path, codes=True)
    assert codes.verify() == []
    errors = write.relative_error(bank, codes)
    assert f"relative error of keys {errors[0]:.3f}, of values {errors[1]:.3f}" in out
    assert 0 < errors[0] < 0.6 and 0 < errors[1] < 0.6
    new = bank.append([65, 66])
    run(place, "--quantize")  # as the codec was, even where it is not said again
    assert "360 bytes a memory" in capsys.readouterr().out
    assert MemoryBank.open(bank.path, codes=True).recall([new]).count.tolist() == [2]
    with pytest.raises(UserError, match="has codec Residual2x6,PQ5x6: drop --codec"):
        run(place, "--codec", "Residual2x5,PQ5x5")


def equal(bank, other):
    """Whether two banks have the same memories, up to rounding."""
    a = bank.recall(bank.live())
    b = other.recall(other.live())
    near = torch.allclose(a.kv.float(), b.kv.float(), rtol=0.02, atol=0.02)
    return near and a.count.tolist() == b.count.tolist()


def test_shards_make_the_bank_of_one_process(place, capsys):
    """Catches a share that is left out or written twice, a shard that makes an index of what is not
    there, and an index or a bank unlike that of one process."""
    (place / "one").mkdir()
    one = run(place, "--out", place / "one" / "kb.bank")
    written = 0
    for i in (3, 1, 2):
        capsys.readouterr()
        bank = run(place, "--shard", f"{i}/3", "--batch", 2)
        out = capsys.readouterr().out
        written += int(re.search(r"(\d+) written", out)[1])
        assert not (bank.path / "index").exists()
    assert written == 29 and bank.verify() == []
    assert "shard 2 of 3 is done; when all are, the index: python write.py --checkpoint" in out
    said = shlex.split(out.split("python write.py ")[1])
    assert said[-2:] == ["--device", "cpu"] and "--batch" in said
    bank = write.main(write.command_line(said))
    assert "complete, nothing to write" in capsys.readouterr().out
    assert equal(one, bank)
    found = [Live.open(b.references).search(["City 7 has", "9 people"], 5) for b in (one, bank)]
    assert np.array_equal(found[0][0], found[1][0])
    with pytest.raises(UserError, match="--codec: a shard is of memories alone; first python") as e:
        run(place, "--shard", "1/3", "--codec", "Residual2x6,PQ5x6")
    first, then = re.findall(
        r"python write.py (.+?)(?: and|$)", str(e.value).replace(", then", " and")
    )
    assert "--shard 1/3" in first and "--codec" not in first
    assert "--shard" not in then and "--codec Residual2x6,PQ5x6" in then
    for wrong in ("0/3", "4/3", "3", "a/b"):
        with pytest.raises(SystemExit):
            run(place, "--shard", wrong)
        assert "1 <= i <= n" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_does_all_that_one_process_does(place):
    """Catches processes that all write everything, or leave a share to nobody, a base without an
    index or without the codes that were asked for, and words of several at once."""
    (place / "one").mkdir()
    one = run(place, "--out", place / "one" / "kb.bank")
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--checkpoint", place / "toy", "--data", place, "--out", place / "kb.bank"]
    flags += ["--device", "cpu", "--batch", 3]

    def torchrun(*more):
        command = [sys.executable, *start, write.__file__, *flags, *more]
        return subprocess.run(map(str, command), capture_output=True, text=True, timeout=500)

    done = torchrun("--codec", "Residual2x6,PQ5x6")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written") == 1 and "kb.bank: 29 written" in done.stdout
    assert done.stdout.count("index: 29 references") == 1 and "--shard" not in done.stdout
    bank = MemoryBank.open(place / "kb.bank", one.model)
    assert bank.verify() == [] and equal(one, bank)
    assert MemoryBank.open(place / "kb.bank", codes=True).verify() == []
    found = [Live.open(b.references).search(["City 7 has"], 5)[0] for b in (one, bank)]
    assert np.array_equal(*found)
    (place / "kb.bin").unlink()
    for wrong in (["--references", "kb"], ["--batch", "many"]):  # ours to refuse, and argparse's
        done = torchrun(*wrong)
        assert done.returncode != 0
        lines = [line for line in done.stderr.splitlines() if line.startswith("write.py: ")]
        assert len(lines) == 1, done.stderr


def test_shards_of_whole_documents(place):
    """Catches a document that two shards share, whose later pieces lack what stands before them."""
    rows = [corpus.tokenizer(place).encode(f"City {i} has {i} towns.") for i in range(11)]
    corpus.References.create(place / "kb", rows, 257, documents=[4, 7])
    (place / "one").mkdir()
    flags = ["--whole_documents", "--references", "kb"]
    one = run(place, "--out", place / "one" / "kb.bank", *flags)
    for i in (2, 3, 1):
        bank = run(place, "--shard", f"{i}/3", *flags)
    assert bank.verify() == [] and equal(one, bank)


def test_a_killed_shard_resumes(place, monkeypatch, capsys):
    """Catches a shard that begins anew after a kill, or takes what is half done for done."""
    keep = MemoryBank._keep
    kept = []

    def killed(bank, part, *rest, **how):
        if len(kept) == 2:
            raise InterruptedError
        kept.append(part)
        return keep(bank, part, *rest, **how)

    monkeypatch.setattr(MemoryBank, "_keep", killed)
    with pytest.raises(InterruptedError):
        run(place, "--shard", "2/2", "--batch", 3)
    monkeypatch.undo()
    n = sum(len(part) for part in kept)
    bank = run(place, "--shard", "2/2", "--batch", 3)
    assert f"{14 - n} written" in capsys.readouterr().out and 0 < n < 14
    assert bank.verify() == [*range(15)]


def test_processes_fill_one_base_at_once(place):
    """Catches processes that make the base at the same moment, each over the other's files."""
    model = load_checkpoint(place / "toy")[0].eval()
    model.fingerprint()
    fork = multiprocessing.get_context("fork")
    start = fork.Event()
    said = fork.Queue()

    def shard(i):
        torch.set_num_threads(1)  # a fork has no other threads
        start.wait()
        try:
            bank = MemoryBank.create(place / "base", model, corpus.References.open(place / "kb"))
            said.put(bank.write(2, progress=False, shard=(i, 3)))
        except BaseException as error:
            said.put(repr(error))

    processes = [fork.Process(target=shard, args=(i,)) for i in (1, 2, 3)]
    for process in processes:
        process.start()
    start.set()
    written = [said.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(written) == [9, 10, 10]
    bank = MemoryBank.open(place / "base", model)
    assert bank.verify() == []


def test_refuses(place, tmp_path):
    """Memories of one tokenizer under the ids of another; a bank of an older checkpoint."""
    bank = run(place)
    before = (bank.path / "memories.bin").read_bytes()
    header = tuple(corpus.tokenizer(place).header)
    checkpoint(place / "toy", header, seed=2)
    with pytest.raises(UserError, match=r"cannot read those memories \(Remark A.1\)") as e:
        run(place)
    # the printed cure, followed
    flags = str(e.value).split("python write.py ")[1].split()
    assert flags[0] == "--checkpoint"
    flags[1] = str(place / "toy")
    other = write.main(write.command_line([*flags, "--device", "cpu"]))
    assert other.verify() == [] and len(other) == 29 and other.path != bank.path
    assert (bank.path / "memories.bin").read_bytes() == before
    checkpoint(place / "toy", (256, 82), seed=1)
    with pytest.raises(UserError, match="another tokenizer"):
        run(place, "--out", place / "second")
    checkpoint(place / "toy", header, seed=1)
    with pytest.raises(UserError, match="--batch 0"):
        run(place, "--batch", 0)
    with pytest.raises(SystemExit):
        run(place, "--out", place / "third", "--dtype", "int8")
    with pytest.raises(UserError, match="other.bin is missing"):
        run(place, "--references", "other")
    corpus.References.create(place / "other", [[65, 66], [67]], 257)
    with pytest.raises(UserError, match="made of other references.*another --out"):
        run(place, "--references", "other")


def test_refuses_a_full_disk(place, monkeypatch):
    """A disk that is full after hours."""
    need = 29 * (2 * 2 * 3 * 5 * 10 * 2 + 8)
    usage = shutil.disk_usage(place)._replace(free=need - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=f"{need:,} bytes to write, {need - 1:,} are free"):
        run(place)
    usage = usage._replace(free=need)
    assert len(run(place)) == 29


def test_relative_error():
    """Keys and values taken for one another."""

    class Pool:
        def __init__(self, kv):
            self.kv = kv

    class Bank:
        def __init__(self, kv):
            self.kv = kv

        def live(self):
            return np.arange(len(self.kv))

        def recall(self, ids):
            return Pool(self.kv[ids])

    x = torch.ones(7, 3, 2, 5, 4, 6)
    y = x.clone()
    y[:, :, 0] += 0.25
    y[:, :, 1] -= 0.5
    assert write.relative_error(Bank(x), Bank(y), n=5) == pytest.approx([0.25, 0.5])


def test_one_line_from_the_command_line(place):
    """A traceback where a flag is wrong."""
    here = Path(write.__file__).parent
    command = [sys.executable, str(here / "write.py"), "--checkpoint", str(place / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("write.py: ") and done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr


def test_another_dtype_is_not_ignored(place):
    """--dtype float32 for a bank of bfloat16, which stays what it is; a bank of float32 that cannot
    be gone on with unless --dtype is given again."""
    run(place)
    with pytest.raises(UserError, match="is a bank of bfloat16, not of float32: drop --dtype"):
        run(place, "--dtype", "float32")
    other = run(place, "--out", place / "exact", "--dtype", "float32")
    assert other.meta["dtype"] == "float32"
    assert run(place, "--out", place / "exact").meta["dtype"] == "float32"


def test_a_medium_that_can_only_be_read(place, monkeypatch):
    """A traceback where the memories are missing and cannot be written."""
    bank = run(place)
    bank.references.connection.close()
    (bank.path / "memories.bin").unlink()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    with pytest.raises(UserError, match="kb.bank can only be read: copy it to where you may write"):
        run(place)


def test_cures_can_be_pasted(place):
    """A path with a blank or a quote that a printed command takes for two words, or worse."""
    moved = place / "it's my data; rm x"
    moved.mkdir()
    for name in ("toy", "kb.bin", "kb.idx", "tokenizer.json"):
        shutil.move(place / name, moved / name)
    common.write_json(moved / "meta.json", dict(n_vocab=257, tokenizer="."))
    flags = ["--checkpoint", str(moved / "toy"), "--data", str(moved), "--device", "cpu"]
    parser = argparse.ArgumentParser()
    generate.model_flags(parser, bank=True)
    model = load_checkpoint(moved / "toy")[0]
    asked = parser.parse_args([*flags, "--bank", str(moved / "new bank")])
    with pytest.raises(UserError, match="no knowledge base here") as e:
        generate.open_memory(asked, model)
    bank = write.main(write.command_line([*pasted(e, "write.py"), "--device", "cpu"]))
    assert bank.path == moved / "new bank" and bank.verify() == []
    with pytest.raises(UserError, match="has no quantized memories") as e:
        MemoryBank.open(bank.path, model, codes=True)
    words = ["--checkpoint", str(moved / "toy"), "--out", str(bank.path), "--quantize"]
    assert pasted(e, "write.py") == words
    with pytest.raises(UserError, match="no knowledge base here") as e:
        MemoryBank.open(moved / "none")
    assert pasted(e, "write.py") == ["--out", str(moved / "none")]
    (bank.path / "index" / "meta.json").write_text("[]")
    with pytest.raises(UserError, match="meta.json is damaged") as e:
        Live.open(bank.references)
    assert pasted(e, "kb.py") == ["index", "--kb", str(bank.path), "--embedder", "hash"]


def pasted(error, file):
    """The words that a shell makes of the command at the end of a refusal."""
    return shlex.split(str(error.value).split(f"python {file} ")[1])
