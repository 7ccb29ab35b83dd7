"""Training on two processes: gloo on the CPU, started by torchrun as on GPUs.

The runs of a test share one start of the processes, which takes longer than they do.
"""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_train import log, make_data, run, same, shape

import parallel
import train
from common import UserError
from model import Config, Memory3, load_checkpoint, read_checkpoint

STAGES = ("implicit", "explicit")
KINDS = ("ddp", "fsdp")
STEPS = 4
START = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

# What every process executes: argv is a list of runs, JSON. stop: raise there, as a kill would.
SCRIPT = """
import json, sys
from pathlib import Path

sys.path[:0] = {paths}
import model, test_train, train

model.MOST_LOGITS = 9 * 4096  # the loss of a window in four parts; that of one process in one
lr_at = train.lr_at
for run in json.loads(sys.argv[1]):
    stop = run.pop("stop", None)

    def killed(step, cfg, seconds):
        if step == stop:
            raise InterruptedError
        return lr_at(step, cfg, seconds)

    train.lr_at = killed
    cfg = test_train.settings(**run)
    try:
        train.main(cfg, test_train.shape(cfg.data))
    except InterruptedError:
        pass
"""


# train.py, whose process 1 cannot take its first step
DIES = """
import os, sys

sys.path[:0] = {paths}
import common, train

loss_on = train.loss_on


def dies(model, batch, device):
    if os.environ["RANK"] == "1" and model.training:
        raise common.UserError("the disk of process 1 is gone")
    return loss_on(model, batch, device)


train.loss_on = dies
train.run(train.cli)
"""


def torchrun(folder, *command, timeout=100):
    """Two processes -> what torchrun said, when all has ended."""
    argv = [*START, *map(str, command)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=folder, timeout=timeout)


def two_processes(folder, runs):
    """Executes the runs, each the changes to test_train.settings, one after the other."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(paths=[str(ROOT), str(ROOT / "tests")]))
    done = torchrun(folder, script, json.dumps(runs))
    assert done.returncode == 0, done.stderr


def options(data, out, stage, **changes):
    """4 windows a step, one at a time; 3 to validate on: the last has nobody beside it."""
    given = dict(data=str(data), out=str(out), stage=stage, steps=STEPS, warmup=0, decay=0.0)
    return given | dict(lr=1e-3, save_every=2, micro_batch=1, eval_batches=3) | changes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with a data set and, in both stages, the runs of one process and of two."""
    folder = tmp_path_factory.mktemp("parallel")
    data = make_data(folder / "tiny")
    runs = []
    for stage in STAGES:
        run(**options(data, folder / f"one_{stage}", stage))
        for kind in KINDS:
            out = folder / f"{kind}_{stage}"
            runs.append(options(data, out, stage, parallel=kind))
            # killed after step 3, of which 2 are saved, and begun again
            killed = options(data, folder / f"{kind}_{stage}_killed", stage, parallel=kind)
            runs += [killed | dict(stop=3), killed]
            # the first half of a run that one process takes over
            half = options(data, folder / f"{kind}_{stage}_half", stage, parallel=kind, steps=2)
            runs.append(half)
    half = options(data, folder / "bf16", "explicit", parallel="fsdp", param_dtype="bfloat16")
    runs.append(half)
    killed = half | dict(out=str(folder / "bf16_killed"))
    runs += [killed | dict(stop=3), killed]
    run(**half | dict(out=str(folder / "bf16_one"), parallel="none"))
    two_processes(folder, runs)
    return folder


def open_last(out):
    """All that a run's last.pt holds, wherever its tensors lie: what one process reads."""
    state, file = read_checkpoint(out / "last.pt")
    if "shards" in state:
        model = Memory3(Config.from_dict(state["meta"]["config"]))
        model.to(getattr(torch, state["meta"]["train"]["param_dtype"]))
        cfg = train.TrainConfig(param_dtype=state["meta"]["train"]["param_dtype"])
        optimizer = train.make_optimizer(model, cfg)
        train.first_states(optimizer)
        parallel.load(model, optimizer, state, out)
        names = {p: name for name, p in model.named_parameters()}
        state["model"] = parallel.whole_weights(model)
        state["optimizer"] = {names[p]: dict(s) for p, s in optimizer.state.items()}
    return state


def close(a, b):
    return torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def compare(one, two):
    """Two runs' logs and checkpoints, equal to rounding."""
    for a, b in zip(log(one), log(two), strict=True):
        assert a["step"] == b["step"] and a["lr"] == b["lr"]
        assert abs(a["loss"] / b["loss"] - 1) < 1e-5 and abs(a["norm"] / b["norm"] - 1) < 1e-3
        if "val" in a and "val" in b:  # a run that ended earlier has one more
            assert a["val"].keys() == b["val"].keys()
            for name, loss in a["val"].items():
                assert abs(loss / b["val"][name] - 1) < 1e-4
    assert "val" in a and "val" in b
    a, b = open_last(one), open_last(two)
    assert list(a["model"]) == list(b["model"]) and a["optimizer"].keys() == b["optimizer"].keys()
    for name, weight in a["model"].items():
        close(weight, b["model"][name])
    for name, state in a["optimizer"].items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            close(state[key], b["optimizer"][name][key])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_two_processes_is_a_step_of_one(world, kind, stage):
    """Catches gradients that are added instead of averaged, windows that both read, a writer whose
    gradient stays at home, a norm of half the weights, a validation of half the data, and weights
    that a checkpoint has half of."""
    compare(world / f"one_{stage}", world / f"{kind}_{stage}")
    ours = load_checkpoint(world / f"{kind}_{stage}")[0]  # a process alone opens it
    assert ours.config == shape(world / "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_on_two_processes_is_bit_exact(world, kind, stage):
    """Catches states of the optimizer or positions that come back to another process, and rows of
    the log that stand there twice."""
    whole, again = world / f"{kind}_{stage}", world / f"{kind}_{stage}_killed"
    a, b = open_last(whole), open_last(again)
    for key in ("model", "optimizer"):
        assert same(a[key], b[key])
    assert [row["step"] for row in log(again)] == [1, 2, 3, 4]
    assert [row["loss"] for row in log(again)] == [row["loss"] for row in log(whole)]


@pytest.mark.slow
def test_weights_in_bfloat16_are_split_and_come_back(world):
    """Catches states of AdamW that are rounded on their way to a file and back, shards whose random
    numbers a resume does not repeat, and a step that does something else than one process's."""
    a, b = open_last(world / "bf16"), open_last(world / "bf16_killed")
    for key in ("model", "optimizer"):
        assert same(a[key], b[key])
    assert a["model"]["norm.weight"].dtype == torch.bfloat16
    assert a["optimizer"]["norm.weight"]["exp_avg"].dtype == torch.float32
    for one, two in zip(log(world / "bf16_one"), log(world / "bf16"), strict=True):
        assert abs(one["loss"] / two["loss"] - 1) < 0.01  # other shards, other random numbers


@pytest.mark.slow
def test_a_run_moves_from_two_processes_to_one_and_back(world):
    """Catches a checkpoint that only as many processes can read, and a share of the batch that is
    kept in it."""
    data = world / "tiny"
    for stage in STAGES:
        run(**options(data, world / f"one_{stage}_6", stage, steps=6))
    runs = []
    for stage in STAGES:
        for kind in KINDS:
            out = world / f"{kind}_{stage}_half"
            cfg, _ = train.command_line(["--resume", str(out), "--steps", "4"])
            assert cfg.parallel == "none" and train.main(cfg)["step"] == 4
            runs.append(options(data, out, stage, parallel=kind, steps=6))
    two_processes(world, runs)
    for stage in STAGES:
        for kind in KINDS:
            compare(world / f"one_{stage}_6", world / f"{kind}_{stage}_half")


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_run(world):
    """Catches a run that waits for ever for a process that has ended."""
    script = world / "dies.py"
    script.write_text(DIES.format(paths=[str(ROOT)]))
    flags = ["--data", world / "tiny", "--preset", "toy", "--context", 64, "--batch", 4]
    flags += ["--out", world / "dies", "--steps", 3, "--eval_batches", 1, "--device", "cpu"]
    done = torchrun(world, script, *flags, "--parallel", "ddp", timeout=60)
    assert done.returncode != 0
    assert "dies.py: the disk of process 1 is gone" in done.stderr
    minutes = int(re.search(r"waits (\d+) minutes", done.stdout)[1])
    assert minutes * 60 == parallel.TIMEOUT.total_seconds()
    assert done.stdout.count("weights:") == 1  # rank 0 alone prints


@pytest.mark.slow
def test_the_sigterm_of_a_batch_system_saves(world):
    """Catches hours of many GPUs that are lost when their time is over, processes that stop after
    different steps and wait for each other, and a checkpoint of a step that is half done."""
    out = world / "sigterm"
    flags = ["--data", world / "tiny", "--preset", "toy", "--n_layer", 4, "--context", 28]
    flags += ["--batch", 2, "--out", out, "--steps", 100_000, "--save_every", 100_000]
    command = [*START, ROOT / "train.py", *flags, "--device", "cpu", "--parallel", "fsdp"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, cwd=world)
    for _ in range(600):
        if (out / "log.jsonl").exists() and len(log(out)) > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert f"which is saved; go on with python train.py --resume {out}" in said
    steps = [row["step"] for row in log(out)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 3
    assert read_checkpoint(out / "last.pt")[0]["meta"]["step"] == len(steps)
    assert not list(out.glob("*.tmp"))


def test_processes_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    """Catches N processes that all train the same run, a run that waits for processes that nobody
    started, and windows that cannot be shared out."""
    data = make_data(tmp_path / "tiny")
    for kind in KINDS:
        with pytest.raises(UserError, match=f"--parallel {kind}: start it with torchrun"):
            run(data, tmp_path / "a", parallel=kind)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="torchrun started 3 processes: add --parallel"):
        run(data, tmp_path / "a")
    monkeypatch.setattr(parallel, "start", lambda kind, device: (0, 3, device))
    with pytest.raises(UserError, match="--batch 4: 3 processes cannot share it out evenly"):
        run(data, tmp_path / "a")
    assert not (tmp_path / "a").exists()
