"""The bench: that its ratios compare like with like, and that a goal says what was measured.

Every part runs at a tiny size; no test looks at how fast anything is.
"""

import doctest
import json
import math
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY

import bench
import model
from benchmarks import baselines, machine, table, training
from common import UserError
from train import TrainConfig

PARTS = ["attention", "throughput", "train", "fits", "load", "codec", "search", "peers"]


@pytest.fixture(scope="module")
def tiny():
    """A preset "tiny", rates that need no measuring, and few vectors to search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "tiny", {**TINY, "ref_len": 5})
        patch.setattr(bench, "roofline", lambda b: (7e9, 3e11))
        patch.setattr(baselines, "FLAT", 501)
        patch.setattr(bench, "TrainConfig", partial(TrainConfig, batch=4))
        yield


def run(tmp_path, *flags):
    return bench.main(
        [
            *flags,
            "--device",
            "cpu",
            "--seconds",
            "0",
            "--tmp",
            f"{tmp_path}/tmp",
            "--out",
            f"{tmp_path}/out",
        ]
    )


@pytest.fixture(scope="module")
def everything(tiny, tmp_path_factory):
    """-> what `bench.py all` measured, what it printed, and where it wrote."""
    tmp_path = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *x, sep=" ": printed.append(sep.join(map(str, x))))
        parts = run(tmp_path, "all", "--preset", "tiny")
    return parts, "\n".join(printed), tmp_path


def bench_of(tmp_path, config, **changes):
    b = dict(
        device=torch.device("cpu"),
        dtype=torch.float32,
        config=config,
        seconds=0,
        BW=7e9,
        F=3e11,
        tmp=tmp_path,
        compile=False,
        most_gib=0,
    )
    return SimpleNamespace(**(b | changes))


# ---------------------------------------------------------------------------------------------
# What is reported


def test_every_part_runs_and_is_kept(everything):
    """Catches a part that fails or measures nothing, a run that does not say how it was made, a
    last line that is no JSON, and memories left behind on the drive."""
    parts, printed, tmp_path = everything
    assert list(parts) == PARTS
    (file,) = (tmp_path / "out").iterdir()
    assert file.name.startswith("cpu-") and json.loads(file.read_text()) == parts
    assert json.loads(printed.splitlines()[-1]) == parts
    assert [*(tmp_path / "tmp").iterdir()] == []
    for part, made in parts.items():
        assert made["kind"] == "cpu" and made["preset"] == "tiny" and made["dtype"] == "float32"
        assert made["threads"] >= 1 and made["torch"] == torch.__version__
        assert made["attention"].startswith(("math (", "cpu-flash (")) and "(" in made["kernels"]
        assert (made["BW, GB/s"], made["F, TFLOP/s"]) == (7.0, 0.3)
        numbers = [x for x in made["figures"].values() if isinstance(x, float)]
        assert numbers or part == "fits"  # which is for a GPU
        assert all(math.isfinite(x) for x in numbers)
    times = [x for name, x in parts["load"]["figures"].items() if "GB/s" in name]
    assert len(times) == 6 and min(times) > 0


def test_every_goal_has_its_figure(everything):
    """Catches a figure that was renamed, so that its goal stays "not measured" for ever."""
    parts = everything[0]
    for goal in table.GOALS:
        if "transformers" not in goal.figure:  # which is optional
            assert isinstance(parts[goal.part]["figures"][goal.figure], float), goal
    assert {goal.name for goal in table.GOALS} == {f"G{i}" for i in range(1, 19)} - {"G13"}


def test_goals_are_judged_at_their_own_shape_only(everything):
    """Catches a toy's figure that passes for the 2.4b's, and a verdict that is always the same."""
    printed = everything[1]
    of_the_paper = [goal for goal in table.GOALS if goal.preset]
    assert printed.count("not measured") >= len(of_the_paper)

    def verdict(name, kind, preset, **figures):
        goal = next(goal for goal in table.GOALS if goal.name == name)
        parts = {goal.part: dict(kind=kind, preset=preset, figures=figures)}
        return table.verdict(goal, parts)

    flat = {"FAISS / torch": 1.25}
    assert verdict("G15", "cpu", "2.4b", **flat) == (1.25, "met")
    assert verdict("G15", "cpu", "toy", **flat) == (None, "not measured")
    assert verdict("G15", "cuda", "2.4b", **{"FAISS / torch": 1.31}) == (1.31, "NOT met")
    assert verdict("G15", "cuda", "2.4b") == (None, "not measured")
    mfu = {"implicit: MFU": 0.41}
    assert verdict("G8", "cuda", "2.4b", **mfu) == (0.41, "met")
    assert verdict("G8", "cpu", "2.4b", **mfu) == (None, "not measured")
    assert verdict("G8", "cuda", "2.4b", **{"implicit: MFU": math.nan}) == (None, "not measured")
    half = {"half the layers: implicit: MFU": 0.5}
    assert verdict("G8", "cuda", "2.4b", **half) == (None, "not measured")
    plain = {"training, a FLOP / plain GPT's": 1.04}
    assert verdict("G16", "cpu", "toy", **plain) == (1.04, "met")


def test_a_part_alone_changes_only_itself(tiny, everything, tmp_path):
    """Catches a run of one part that throws away the others, or keeps its own old figures."""
    parts = everything[0]
    file = tmp_path / "out" / f"{machine.file_name(machine.name_of(torch.device('cpu')))}.json"
    file.parent.mkdir()
    old = {part: {**made, "figures": {"old": 1.0}} for part, made in parts.items()}
    file.write_text(json.dumps(old))
    run(tmp_path, "load", "--preset", "tiny")
    now = json.loads(file.read_text())
    assert set(now["load"]["figures"]) == set(parts["load"]["figures"])
    assert {**now, "load": 0} == {**old, "load": 0}


def test_without_faiss_the_rest_is_measured(tiny, tmp_path, monkeypatch, capsys):
    """Catches a bench that dies on a GPU machine without FAISS, and figures made up for it."""
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails
    monkeypatch.setattr(bench, "PARTS", {k: bench.PARTS[k] for k in ("search", "codec")})
    parts = run(tmp_path, "all", "--preset", "tiny")
    assert list(parts) == ["codec"] and "search is not measured:" in capsys.readouterr().out
    assert set(parts["codec"]["figures"]) == {
        "decode into the cache, vectors/s",
        "decode, vectors/s",
        "decode 160 memories, ms",
    }
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        run(tmp_path, "search", "--preset", "tiny")


def test_the_readmes_table_is_that_of_the_files(tmp_path):
    """Catches a table that --check accepts though it is another's, marks that get lost, a device
    without its column, and a cell filled where nothing was measured."""
    readme, folder = tmp_path / "README.md", tmp_path / "benchmarks"
    folder.mkdir()
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    made = dict(device="CPU A", kind="cpu", preset="2.4b")
    figures = {"merged / causal": 1.5, "merged / concatenate": 0.5}
    parts = dict(search={**made, "figures": {"FAISS / torch": 1.0321}})
    parts["attention"] = {**made, "figures": figures}
    (folder / "cpu-a.json").write_text(json.dumps(parts))
    with pytest.raises(ValueError, match="python benchmarks/table.py"):
        table.main(["--check"], readme, folder)
    assert "old" in readme.read_text()  # --check changes nothing
    table.main([], readme, folder)
    table.main(["--check"], readme, folder)
    lines = readme.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert lines[2] == "| | goal | bound | CPU A | a GPU |"
    row = {line.split("|")[2].strip(): line.split("|")[3:-1] for line in lines[4:-2]}
    assert [x.strip() for x in row["flat search, time over torch matmul + topk"]] == [
        "<= 1.3",
        "1.03",
        "not measured",
    ]
    cells = row["attention and backward, time over causal alone"]
    assert [x.strip() for x in cells] == ["<= 1.4", "1.5, NOT met", "not measured"]
    cells = row["implicit stage: model FLOPs utilisation"]
    assert [x.strip() for x in cells] == [">= 0.4", "", "not measured"]
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="no place"):
        table.main([], readme, folder)


def test_the_readme_of_this_repository():
    """Catches a page whose table was edited by hand, or not made anew after a measurement."""
    table.main(["--check"])


def test_worked_examples():
    """Catches a device whose name makes a file name that a shell or a file system refuses."""
    assert doctest.testmod(machine) == (0, 1)


def test_bad_flags_are_one_line(tmp_path):
    """Catches a traceback for a device that there is not."""
    with pytest.raises(ValueError, match="--device nonsense"):
        bench.main(["search", "--device", "nonsense", "--tmp", f"{tmp_path}"])


# ---------------------------------------------------------------------------------------------
# What is measured


@pytest.mark.parametrize("T", [41, 42, 3])
def test_all_ways_of_attention_compute_the_same(config, T):
    """Catches a baseline that is fast because it does something else: one chunk too many, a header
    that reads memories, a lost last chunk; and a bench whose merged way reads no memory."""
    b = bench_of(None, config)
    tensors, dout, ways = baselines.attention_case(b, T, torch.float64)
    out = {name: baselines.both(f, tensors, dout) for name, f in ways.items()}
    for name in ("concatenate", "loop"):
        for x, y in zip(out["merged"], out[name], strict=True):
            assert (x - y).abs().max() < 1e-12, name
    P = len(config.header)
    assert out["causal"][0][:, :, :P].allclose(out["merged"][0][:, :, :P])
    assert (out["causal"][0] - out["merged"][0])[:, :, P:].abs().amax(-1).min() > 1e-6
    assert out["causal"][4:] == [None, None]  # no gradient for memories that it does not see


def test_runs_take_turns_and_the_first_round_is_dropped(monkeypatch):
    """Catches all runs of one side before those of the other, a warm-up that counts, `before`
    forgotten or timed, and means that one hiccup moves."""
    log, now = [], [0.0]
    seconds = dict(a=[50, 1, 2, 2, 90, 2, 2, 2, 2], b=[9, 4, 4, 3, 3, 3, 5, 4, 4])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def take(name):
        now[0] += seconds[name][log.count(name)]
        log.append(name)

    def before():
        now[0] += 1000
        log.append("drop")

    b = SimpleNamespace(device=torch.device("cpu"), seconds=1e9)
    runs = dict(a=lambda: take("a"), b=lambda: take("b"))
    assert machine.times(b, runs, before) == dict(a=2, b=4)
    assert log == ["drop", "a", "drop", "b"] * 9
    log.clear()
    b.seconds = 0  # no time: a round to warm up and two that count
    assert machine.times(b, runs) == dict(a=1.5, b=4) and log == ["a", "b"] * 3


def test_quick_runs_are_called_many_times_a_turn(monkeypatch):
    """Catches the time of a GPU's launch for that of a kernel, and a sum taken for one call's."""
    calls, now = [0], [0.0]
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def quick():
        calls[0] += 1
        now[0] += 1e-3

    b = SimpleNamespace(device=torch.device("cpu"), seconds=1e9)
    t = machine.times(b, dict(quick=quick))["quick"]
    assert t == pytest.approx(1e-3) and calls[0] > 60


def test_the_bytes_of_a_step_are_those_of_the_tensors(config):
    """Catches embeddings counted as read, memories counted in every layer, values forgotten."""
    whole, B, context = model.Memory3(config), 3, 17
    weights = sum(m.weight.numel() for m in whole.modules() if isinstance(m, torch.nn.Linear))
    kv = config.n_layer * 2 * config.n_kv_head * config.head_dim * context
    memories = config.n_recall * math.prod(config.memory_shape)
    b = bench_of(None, config, dtype=torch.bfloat16)
    assert baselines.step_bytes(b, B, context, False) == 2 * (weights + B * kv)
    assert baselines.step_bytes(b, B, context, True) == 2 * (weights + B * (kv + memories))


def test_the_floor_of_the_papers_workload():
    """Catches a floor without the weights of every step, or with FLOPs for bytes. By hand, 2.4b,
    batch 32, 128 + 128 tokens, 3 TB/s, 700 TFLOP/s: 127 steps of 5.25 GB of weights, 0.69 GB of
    context and 0.07 of memories, after a prefill of 128 x 32 tokens of 2 x 2.43e9 FLOPs."""
    b = bench_of(None, model.Config.preset("2.4b"), dtype=torch.bfloat16, BW=3e12, F=7e14)
    by_hand = 127 * (5.25e9 + 0.69e9 + 0.072e9) / 3e12 + 128 * 32 * 2 * 2.43e9 / 7e14
    assert baselines.floor(b, 32, 128, 128, True) == pytest.approx(by_hand, rel=0.02)
    step = baselines.step_bytes(b, 32, 192, True) / baselines.step_bytes(b, 32, 192, False)
    assert step == pytest.approx(1.012, abs=5e-4)  # the floor of goal G4
    slow = bench_of(None, b.config, dtype=torch.bfloat16, BW=3e12, F=1e12)
    flops = 32 * (128 * 2 * 2.43e9 + 127 * 2 * 2.63e9)  # a step's with the LM head
    assert baselines.floor(slow, 32, 128, 128, True) == pytest.approx(flops / 1e12, rel=0.02)


def test_no_reference_is_found_twice_in_a_run():
    """Catches loads that the page cache answers: Table 7.6 makes the ids of a run unique."""
    found = baselines.WorstCase(97)
    ids = np.concatenate([found.search(["x"] * 6, 4)[0].ravel() for _ in range(4)])
    assert len(set(ids.tolist())) == 96 and ids.max() < 97
    assert (np.diff(ids) != 1).sum() > 80  # in no order that a drive would read ahead


def test_random_banks_are_banks(config, tmp_path, monkeypatch):
    """Catches records of the wrong size or without checksums, codes that FAISS cannot decode, a
    cache that answers instead of the drive, and a disk filled to the brim."""
    b = bench_of(tmp_path, config)
    codec = baselines.random_codec(config)
    assert codec.spec == "Residual2x10,PQ2x10"  # bits 20 to 23 and 44 to 47 belong to no number
    assert (baselines.random_codes(config, codec, 9)[..., [2, 5]] < 16).all()
    for bank in (
        baselines.random_bank(b, tmp_path, 3),
        baselines.random_bank(b, tmp_path, 3, codec),
    ):
        assert len(bank) == 9 * 3 * config.n_recall and bank.verify() == []
        for _ in range(2):
            pool = bank.recall([7, 2])
        assert pool.kv.shape == (2, *config.memory_shape) and pool.kv.isfinite().all()
        assert pool.count.tolist() == [5, 5] and bank.hits == 0 and bank.misses == 4
        assert baselines.drop(bank) in (True, False, None)
        assert set(baselines.readers(bank, 4)) == {"bank", "preadv", "memmap"}
    room = SimpleNamespace(free=1000)
    monkeypatch.setattr(baselines.shutil, "disk_usage", lambda _: room)
    with pytest.raises(ValueError, match="--tmp"):
        baselines.random_bank(b, tmp_path / "small", 3)


def test_readers_read_the_same(config, tmp_path):
    """Catches a baseline that is fast because it reads fewer bytes, or the wrong ones."""
    bank = baselines.random_bank(bench_of(tmp_path, config), tmp_path, 5)
    file = np.fromfile(bank.path / "memories.bin", np.uint8).reshape(len(bank), -1)
    file = file[:, : bank.record_bytes]  # the rest of a record vouches for it
    ids = np.sort(baselines.WorstCase(len(bank)).ids[:11])
    read = baselines.readers(bank, 11)["memmap"]()
    assert (read == file[ids]).all()
    rows = baselines.readers(bank, 11)["preadv"]()
    assert (rows == file[ids]).all()
    kv = baselines.readers(bank, 11)["bank"]().kv
    assert (kv.contiguous().view(torch.uint8).view(11, -1).numpy() == file[ids]).all()


def test_the_micro_batch_is_halved_until_it_fits(config, monkeypatch):
    """Catches a bench that dies of a lack of memory, one that goes on with half an optimizer, and
    half a model whose figures count as the whole's."""
    monkeypatch.setattr(bench, "TrainConfig", partial(TrainConfig, batch=8))
    monkeypatch.setattr(training.gc, "collect", lambda: None)  # takes longer than the rest
    calls, loss_on, make, layers = [], training.loss_on, training.make_optimizer, [config.n_layer]

    def short(model, batch, device):
        calls.append((model.config.n_layer, len(batch[0]), batch[2] is not None))
        if len(batch[0]) > (2 if batch[2] is not None else 4) or calls[-1][0] > layers[0]:
            raise torch.OutOfMemoryError("no memory")
        return loss_on(model, batch, device)

    def dies_once(model, cfg):
        optimizer = make(model, cfg)

        def step():
            del optimizer.step  # from now on the class's
            optimizer.state[model.head.weight] = dict(step=torch.zeros(()))  # and no moments
            raise torch.OutOfMemoryError("no memory")

        optimizer.step = step
        return optimizer

    monkeypatch.setattr(training, "loss_on", short)
    b = bench_of(None, config)
    out = bench.train(b)
    assert (out["implicit: micro-batch"], out["explicit: micro-batch"]) == (4, 2)
    assert [c[1] for c in calls[:3]] == [8, 4, 4]
    assert calls.count((4, 4, False)) == 2 * 5  # 8 windows: to try it twice, and three rounds
    monkeypatch.setattr(training, "make_optimizer", dies_once)
    layers[0] = 2
    out = bench.train(b)
    assert "implicit: MFU" not in out and out["half the layers: implicit: micro-batch"] == 2
    layers[0] = 0
    assert bench.train(b) == {"half the layers: fits": False}
