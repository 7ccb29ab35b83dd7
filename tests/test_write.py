"""write.py from the command line to the bank, at tiny size."""

import base64
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import corpus
import write
from bank import MemoryBank
from common import UserError
from memory import attention_path
from model import Config, Memory3, save_checkpoint

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
    config = Config(
        n_layer=3,
        n_memory_layer=2,
        n_head=6,
        n_kv_head=3,
        head_dim=10,
        mlp_width=22,
        vocab_size=263,
        memory_tokens=5,
        ref_len=59,
        header=header,
    )
    path.mkdir(exist_ok=True)
    model = Memory3(config)
    save_checkpoint(path / "model.pt", model.state_dict(), dict(config=asdict(config)))
    return model


def run(place, *flags):
    args = ["--checkpoint", place / "toy", "--data", place, "--out", place / "out" / "kb.bank"]
    return write.main(write.command_line([str(a) for a in [*args, "--device", "cpu", *flags]]))


def test_writes_and_says_so(place, capsys):
    """A bank that is not complete; a second run that writes again; numbers that are not printed."""
    bank = run(place, "--batch", 7)
    assert bank.verify() == [] and bank.meta["tokenizer"] is None
    out = capsys.readouterr().out
    path = attention_path(torch.device("cpu"), torch.float32, 59 + len(bank.model.config.header))[0]
    assert f"device: cpu, torch.float32; attention: {path} (" in out
    assert f"29 memories of {2 * 2 * 3 * 5 * 10 * 2:,} bytes" in out and "34,800 bytes in" in out
    assert "29 written, " in out and "memories/s" in out
    before = (bank.path / "memories.bin").stat().st_mtime_ns
    run(place)
    assert "complete, nothing to write" in capsys.readouterr().out
    assert (bank.path / "memories.bin").stat().st_mtime_ns == before
    os.truncate(bank.path / "crc.bin", 0)
    os.truncate(bank.path / "crc.bin", 29 * 4)
    assert run(place).verify() == [] and "29 written" in capsys.readouterr().out


def test_quantizes(place, capsys):
    """--quantize without a codec's name and error; trained again each time."""
    flags = ["--quantize", place / "codes", "--codec", "Residual2x6,PQ5x6"]
    bank = run(place, *flags)
    out = capsys.readouterr().out
    assert "quantized in" in out and "Residual2x6,PQ5x6, 360 bytes a memory, 3.3 times" in out
    codes = MemoryBank.open(place / "codes")
    assert codes.verify() == [] and codes.meta["fingerprint"] == bank.meta["fingerprint"]
    errors = write.relative_error(bank, codes)
    assert f"relative error of keys {errors[0]:.3f}, of values {errors[1]:.3f}" in out
    assert 0 < errors[0] < 0.6 and 0 < errors[1] < 0.6
    run(place, *flags)
    out = capsys.readouterr().out
    assert out.count("complete, nothing to write") == 2 and "360 bytes a memory" in out
    with pytest.raises(ValueError, match="not quantized"):
        run(place, "--quantize", bank.path)
    with pytest.raises(ValueError, match="has codec Residual2x6,PQ5x6; remove it"):
        run(place, "--quantize", place / "codes", "--codec", "Residual2x5,PQ5x5")


def test_codes_follow_a_live_change(place):
    """A demo that fails, or reads stale codes, after a fact was remembered."""
    flags = ["--quantize", place / "codes", "--codec", "Residual2x6,PQ5x6"]
    bank = run(place, *flags)
    new = bank.append([65, 66])
    run(place, *flags[:2])  # as the codec was, even where it is not said again
    run(place, *flags)
    codes = MemoryBank.open(place / "codes", bank.model, bank.references)
    assert len(codes) == new + 1 and codes.verify() == []


def test_keeps_codes_of_another_text(place):
    """A quantized bank removed because --data is not that which it was made from."""
    flags = ["--quantize", place / "codes", "--codec", "Residual2x6,PQ5x6"]
    run(place, *flags)
    before = (place / "codes" / "memories.bin").read_bytes()
    corpus.References.create(place / "other", [[65, 66], [67]], 257)
    with pytest.raises(ValueError, match="codes was written from.*remove.*write.py again"):
        run(place, "--references", "other", "--out", place / "second", *flags)
    assert (place / "codes" / "memories.bin").read_bytes() == before


def test_refuses(place, tmp_path):
    """Memories of one tokenizer under the ids of another; a bank of an older checkpoint."""
    run(place)
    checkpoint(place / "toy", (256, 82), seed=1)
    with pytest.raises(ValueError, match="another tokenizer"):
        run(place)
    checkpoint(place / "toy", tuple(corpus.tokenizer(place).header), seed=2)
    with pytest.raises(ValueError, match=r"cannot read those memories \(Remark A.1\)"):
        run(place)
    run(place, "--out", place / "second")
    with pytest.raises(ValueError, match="--batch 0"):
        run(place, "--batch", 0)
    with pytest.raises(ValueError, match="dtype int8"):
        run(place, "--out", place / "third", "--dtype", "int8")
    with pytest.raises(UserError, match="other.bin is missing"):
        run(place, "--references", "other")


def test_refuses_a_full_disk(place, monkeypatch):
    """A disk that is full after hours."""
    usage = shutil.disk_usage(place)._replace(free=34_799)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="34,800 bytes to write, 34,799 are free"):
        run(place)
    usage = usage._replace(free=34_800)
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
