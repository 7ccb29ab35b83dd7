"""experiments/drift.py: what is compared, and who reads whose memories (Remark A.1)."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_text import C, T, opened, world  # noqa: F401  (fixtures)

from experiments import drift
from experiments.drift import compare, everything, loss
from experiments.text import text_losses
from model import load_checkpoint, save_checkpoint


def test_everything_writes_all_tokens(build, references):
    """A twin with other weights, or one that still leaves tokens out or sorts them otherwise."""
    model = build()
    refs = references([13, 4, 7, 1])
    with torch.no_grad():
        kept, index = model.write(refs, return_indices=True)
        whole, all_of = everything(model.float()).write(refs, return_indices=True)
    for i, n in enumerate((13, 4, 7, 1)):
        assert whole.count[i] == n and all_of[i, ..., :n].tolist() == [[[*range(n)]] * 2] * 3
        for l in range(3):
            for h in range(2):
                at = index[i, l, h][index[i, l, h] >= 0]
                want = kept.kv[i, l, :, h, : len(at)]
                got = whole.kv[i, l, :, h, at]
                torch.testing.assert_close(got.double(), want, atol=1e-3, rtol=1e-3)


def test_compare_is_over_the_tokens_that_the_reader_keeps(build, references):
    """Slot compared with slot where the two keep different tokens, keys with values, empty slots
    counted as agreement, the older writer's choice taken for the newer's."""
    old = build(seed=3)
    new = build(seed=3)
    refs = references([13, 4, 9, 11, 2])
    with torch.no_grad():  # near enough that many tokens agree
        for p, q in zip(new.parameters(), build(seed=9).parameters(), strict=True):
            p.copy_(0.8 * p + 0.2 * q)
    same = compare(new, new, refs, batch=3)
    assert all(x == pytest.approx(1) for x in same.values())
    got = compare(old.float(), new.float(), refs, batch=2)
    with torch.no_grad():
        kept, index = new.write(refs, return_indices=True)
        other = old.write(refs, return_indices=True)[1]
        whole = everything(old).write(refs).kv
    keys = []
    values = []
    both = []
    for n in range(5):
        for l in range(3):
            for h in range(2):
                for s, j in enumerate(index[n, l, h].tolist()):
                    if j >= 0:
                        pair = zip(whole[n, l, :, h, j], kept.kv[n, l, :, h, s], strict=True)
                        key, value = [float(F.cosine_similarity(a, b, dim=0)) for a, b in pair]
                        keys = [*keys, key]
                        values = [*values, value]
                        both.append(j in other[n, l, h].tolist())
    assert len(both) == 6 * (5 + 4 + 5 + 5 + 2)
    want = dict(keys=keys, values=values, kept=both)
    assert got == {k: pytest.approx(sum(x) / len(both), abs=1e-4) for k, x in want.items()}
    assert 0.3 < got["kept"] < 0.99 and 0 < got["values"] < 0.99


def test_loss_is_the_readers(world, opened, tmp_path):  # noqa: F811
    """The loss of the old model instead of the new one's; the last, smaller batch overweighted."""
    windows, n = opened
    model = world.model
    stale = world.save(tmp_path / "other.pt", seed=2)
    want = text_losses(model, windows, n, ["none", "recalled"])
    assert loss(model, model, windows, n, batch=3) == pytest.approx(want["recalled"], abs=1e-5)
    assert loss(model, None, windows, n, batch=2) == pytest.approx(want["none"], abs=1e-5)
    assert abs(loss(model, stale, windows, n) - want["recalled"]) > 1e-3


@pytest.fixture
def run(world, tmp_path):  # noqa: F811
    """The world's checkpoint, and two of a run that began from it: 20 and 50 steps on."""
    files = []
    for step, out in ((700, "out/before"), (20, "out/on"), (50, "out/on")):
        model, meta = load_checkpoint(world.checkpoint)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=g) * p.std() * (step % 100) / 400)
        meta |= dict(step=step, train=dict(out=out))
        files.append(str(tmp_path / f"{len(files)}.pt"))
        save_checkpoint(files[-1], model.state_dict(), meta)
    return files


def test_main(world, run, tmp_path, capsys):  # noqa: F811
    """Steps counted from the wrong end, the last checkpoint's own row not the fresh one."""
    flags = ["--data", world.data, "--split", "said", "--context", T, "--device", "cpu"]
    flags += ["--png", tmp_path / "pictures/drift.png", "--json", tmp_path / "new/drift.json"]
    result = drift.main([*run, *map(str, flags)])
    assert json.loads((tmp_path / "new/drift.json").read_text()) == result
    printed = capsys.readouterr().out
    assert [row["behind"] for row in result["drift"]] == [50, 30, 0]
    assert [row["checkpoint"] for row in result["drift"]] == run
    fresh = result["drift"][-1]
    last = load_checkpoint(run[-1])[0]
    a = SimpleNamespace(data=str(world.data), split="said", context=T, windows=64)
    windows, n = drift.open_text(a, last.config)
    own = text_losses(last, windows, n, ["none", "recalled"])
    assert fresh["loss"] == pytest.approx(own["recalled"], abs=1e-5)
    assert result["without"] == pytest.approx(own["none"], abs=1e-5)
    assert fresh["keys"] == pytest.approx(1) and fresh["kept"] == 1
    old = load_checkpoint(run[0])[0]
    assert result["drift"][0]["loss"] == pytest.approx(loss(last, old, windows, n), abs=1e-5)
    found = np.unique(windows.neighbors[: n * T // C])
    references = windows.references.batch(found[found >= 0])
    assert result["drift"][0].items() >= compare(old, last, references).items()
    assert result["drift"][0]["values"] < result["drift"][1]["values"] < 1
    assert printed.count("attention of a prompt of one chunk") == 3
    assert "| 50 |" in printed and "| no memories |" in printed
    picture = tmp_path / "pictures/drift.png"
    assert picture.exists() or "pip install matplotlib" in printed
    assert not picture.exists() or 5_000 < picture.stat().st_size < 150_000


def test_bad_input_is_one_line(world, run, tmp_path):  # noqa: F811
    """Checkpoints of two shapes compared, or one alone; the text of another tokenizer read; steps
    below 0 where the last checkpoint comes first."""
    other = tmp_path / "other.pt"
    world.save(other, seed=2, memory_tokens=3)
    flags = [str(x) for x in ["--data", world.data, "--split", "said", "--context", 3 * C]]
    for files, line in [
        (run[:1], "give two checkpoints or more"),
        ([run[0], "nowhere.pt"], "nowhere.pt: no checkpoint there"),
        ([str(other), run[0]], "not the same shape and tokenizer"),
        ([run[2], run[1]], "2.pt is later than .*1.pt: give the last one last"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=line):
            drift.main([*files, *flags])
    for wrong in (["--shots", "3"], ["--checkpoint", run[0]], ["--n_recall", "-1"]):
        with pytest.raises(SystemExit):
            drift.main([*run, *flags, *wrong])
