"""benchmarks/fits.py: bytes counted on tensors without numbers."""

import doctest
import json
import re

import pytest
import torch
from conftest import ROOT, TINY

from benchmarks import fits
from common import UserError
from model import Config


def test_storages_are_counted_once_and_until_their_end():
    """Catches views and changes in place that count twice, and tensors that never leave."""
    with fits.FakeTensorMode(), fits.Counted() as counter:
        x = torch.zeros(50, 20)  # 4,000 bytes
        y = x.view(-1)[3:]
        y.add_(1)
        assert counter.now == 4000
        z = torch.cat([x, x])
        assert counter.now == counter.peak == 12000
        del z
        assert counter.now == 4000
        del x
        assert counter.now == 4000  # y is still there
        del y
        assert counter.now == 0 and counter.peak == 12000


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["implicit", "explicit"])
def test_peak_of_a_step_has_all_its_parts(stage):
    """Catches a peak without gradients, states or activations, of another number of windows, and
    flags that do nothing."""
    config = Config(**TINY | dict(n_layer=9))

    def peak(windows, config=config, **changes):
        cfg = fits.settings(stage, 84, windows, "bfloat16", changes)
        return fits.counted(config, cfg)

    n = config.n_params + 2 * 97 * 60  # weights, norms aside
    one = peak(1)
    assert one > 16 * n  # weights, gradients, two states
    assert 12 * n < peak(1, param_dtype="bfloat16") < one
    many = peak(40)
    assert peak(40, recompute=True) < 0.6 * many
    # what is kept for the backward grows with the layers: of each at least the inputs of its four
    # products and of the activation, in bfloat16
    deeper = peak(40, Config(**TINY | dict(n_layer=18)))
    assert deeper - many > 9 * 40 * 84 * 2 * (60 + 60 + 60 + 34 + 2 * 34)


def test_columns_and_what_was_measured():
    """Columns that run together where a model is so small that 10,000 windows fit, GiB for GB, a
    measured peak in another's row."""
    row = fits.row_of("implicit", "--recompute", 1e9, None, 1e5, [12345, 123456])
    assert row.split() == ["implicit", "--recompute", "1.00", "0.000", "12345", "123456"]
    device, peaks = fits.from_bench("2.4b", 2048)
    assert device == "NVIDIA H200" and len(peaks) == 2 * len(fits.CASES)
    found = json.loads((ROOT / "benchmarks/nvidia-h200.json").read_text())["fits"]["figures"]
    gib = found["explicit, bfloat16 weights, recomputing: peak memory, GiB"]
    assert peaks["explicit", "--param_dtype bfloat16 --recompute"] == gib * 2**30
    assert fits.from_bench("2.4b", 1024) == fits.from_bench("toy", 512) == (None, {})


@pytest.mark.slow
def test_command_and_worked_example(capsys, monkeypatch):
    """Catches a table without a row, and a window that the model cannot take."""
    monkeypatch.setattr(fits, "CASES", {"--recompute": dict(recompute=True)})
    monkeypatch.setitem(fits.PRESETS, "toy", dict(fits.PRESETS["toy"], n_layer=2, n_memory_layer=1))
    rows = fits.main(["--preset", "toy", "--context", "64"])
    assert list(rows) == [("implicit", "--recompute"), ("explicit", "--recompute")]
    for one, each, most in rows.values():
        assert 0 < each < one and most == sorted(most) and most[0] > 100
    assert capsys.readouterr().out.count("--recompute") == 2
    for context, line in (
        ("513", "--context 513: 1 to 512"),
        ("40", "no multiple of chunk_len 32"),
    ):
        with pytest.raises(UserError, match=line):
            fits.main(["--preset", "toy", "--context", context])
    assert doctest.testmod(fits).failed == 0


@pytest.mark.slow
def test_page_shows_what_is_counted():
    """Catches a table of benchmarks/scale.md that is no longer what its command counts."""
    page = (ROOT / "benchmarks/scale.md").read_text()
    rows = re.findall(r"^(\w+plicit) (.*?)  +([\d.]+)  +[\d.]+ ", page, re.M)
    assert len(rows) == 2 * len(fits.CASES)
    for stage, flags, shown in rows:
        if flags == "--param_dtype bfloat16":
            cfg = fits.settings(stage, 2048, 1, "bfloat16", fits.CASES[flags])
            now = fits.counted(Config.preset("2.4b"), cfg) / 1e9
            assert abs(now / float(shown) - 1) < 0.03
