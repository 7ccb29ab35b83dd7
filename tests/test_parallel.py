"""Training on two processes and three: gloo on the CPU, started by torchrun as on GPUs.

The runs of a test share one start of the processes, which takes longer than they do. What one
process of fsdp does with its files is tested without torchrun: a process can be all there are.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_train import log, make_data, run, same, shape

import model as model_module
import parallel
import train
from common import UserError
from model import Config, Memory3, load_checkpoint, read_checkpoint

STAGES = ("implicit", "explicit")
KINDS = ("ddp", "fsdp")
STEPS = 4
START = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]

# What every process executes: argv is a list of runs, JSON. stop: raise there, as a kill would.
SCRIPT = """
import datetime, json, sys, time
from pathlib import Path

sys.path[:0] = {paths}
import model, parallel, test_train, train

if len(sys.argv) > 2:  # what the first process saves takes longer than a step may
    parallel.TIMEOUT = datetime.timedelta(seconds=8)
    save_checkpoint = train.save_checkpoint

    def slow(path, *args, **how):
        time.sleep(11 * (path.name == sys.argv[2]))
        save_checkpoint(path, *args, **how)

    train.save_checkpoint = slow
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
parallel.stop()
"""


# train.py, whose process 1 cannot take its third step: it fails, or it hangs
DIES = """
import os, sys, time

sys.path[:0] = {paths}
import common, train

loss_on = train.loss_on
steps = []


def dies(model, batch, device):
    if os.environ["RANK"] == "1" and model.training:
        steps.append(1)
        if len(steps) == 3 and {hangs}:
            open("hangs", "w").close()
            time.sleep(1000)
        if len(steps) == 3:
            raise common.UserError("the disk of process 1 is gone")
    return loss_on(model, batch, device)


train.loss_on = dies
train.run(train.cli)
"""


def torchrun(folder, *command, timeout=500, n=2):
    """n processes -> what torchrun said, when all has ended."""
    argv = [*START, str(n), *map(str, command)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=folder, timeout=timeout)


def processes(n, folder, runs, *slow):
    """Executes the runs, each the changes to test_train.settings, one after the other. slow: the
    file that takes longer to save than a step may."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(paths=[str(ROOT), str(ROOT / "tests")]))
    done = torchrun(folder, script, json.dumps(runs), *slow, n=n)
    assert done.returncode == 0, done.stderr


def options(data, out, stage, **changes):
    """6 windows a step, one at a time; 5 to validate on: the last has nobody beside it."""
    given = dict(data=str(data), out=str(out), stage=stage, steps=STEPS, warmup=0, decay=0.0)
    given |= dict(batch=6)
    return given | dict(lr=1e-3, save_every=2, micro_batch=1, eval_batches=1) | changes


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
    processes(2, folder, runs)
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
def test_a_run_moves_from_two_processes_to_one_and_to_three(world):
    """Catches a checkpoint that only as many processes can read, one process's that several cannot,
    a share of the batch that is kept in it, and parts of an old save that stay."""
    data = world / "tiny"
    for stage in STAGES:
        run(**options(data, world / f"one_{stage}_6", stage, steps=6))
    runs = []
    for stage in STAGES:
        for kind in KINDS:
            out = world / f"{kind}_{stage}_half"
            cfg, _ = train.command_line(["--resume", str(out), "--steps", "4"])
            assert cfg.parallel == "none" and train.main(cfg)["step"] == 4
            assert not list(out.glob("last_*"))
            runs.append(options(data, out, stage, parallel=kind, steps=6))
    processes(3, world, runs)
    for stage in STAGES:
        for kind in KINDS:
            out = world / f"{kind}_{stage}_half"
            compare(world / f"one_{stage}_6", out)
            parts = [f"__{i}_0.distcp" for i in range(3)] + [".metadata"]
            found = sorted(path.name for path in out.glob("last_*/*"))
            assert found == (sorted(parts) if kind == "fsdp" else [])


@pytest.mark.slow
def test_a_slow_disk_does_not_end_the_run(world):
    """Catches the ten minutes of a step as the most that the first process may take to save, while
    the others wait."""
    small = dict(steps=1, save_every=9, eval_batches=1)
    outs = [world / f"slow_{kind}" for kind in KINDS]
    runs = []
    for kind, out in zip(KINDS, outs, strict=True):
        runs.append(options(world / "tiny", out, "implicit", parallel=kind, **small))
    processes(2, world, runs, "model.pt")
    for out in outs:
        assert load_checkpoint(out)[1]["step"] == 1


def small_flags(world, out):
    """The command line of a run of several steps, of which the first is the slowest."""
    flags = ["--data", world / "tiny", "--preset", "toy", "--n_layer", 4, "--context", 28]
    return [*flags, "--batch", 2, "--out", out, "--eval_batches", 1, "--device", "cpu"]


PARTS = """
import sys

sys.path[:0] = {paths}
import torch, parallel


def main():
    parallel.join(torch.device("cpu"))
    sys.setswitchinterval(9)  # this thread keeps the interpreter's lock while it computes
    for i in range(9):
        parallel.everywhere(i)


parallel.run(main)
"""


@pytest.mark.slow
def test_processes_part_before_python_ends(tmp_path):
    """Catches "terminate called without an active exception", and an exit code that is not 0, after
    all went well: Python had ended while a thread of gloo still held a tensor."""
    script = tmp_path / "parts.py"
    script.write_text(PARTS.format(paths=[str(ROOT)]))
    done = torchrun(tmp_path, script, n=7)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_run(world):
    """Catches a run that waits for ever for a process that has ended, and an error that nobody says
    because it is not the first process's."""
    script = world / "dies.py"
    script.write_text(DIES.format(paths=[str(ROOT)], hangs=False))
    flags = [*small_flags(world, world / "dies"), "--steps", 5, "--parallel", "ddp"]
    done = torchrun(world, script, *flags)
    assert done.returncode != 0
    assert "dies.py: the disk of process 1 is gone (process 1)" in done.stderr
    found = re.search(r"waits (\d+) minutes for a step, (\d+) hours for a file", done.stdout)
    assert int(found[1]) * 60 == parallel.TIMEOUT.total_seconds()
    assert int(found[2]) * 3600 == parallel.FILE_TIMEOUT.total_seconds()
    assert done.stdout.count("weights:") == 1  # rank 0 alone prints


@pytest.mark.slow
def test_a_step_that_hangs_ends_soon_after_sigterm(world):
    """Catches processes that a SIGTERM does not reach, for they wait for one that is gone, until
    SIGKILL after the 300 s that this torchrun gives them."""
    script = world / "hangs.py"
    script.write_text(DIES.format(paths=[str(ROOT)], hangs=True))
    flags = [*small_flags(world, world / "hangs_out"), "--steps", 100_000, "--parallel", "ddp"]
    command = [*START, "2", script, *flags]
    env = dict(os.environ, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="300")
    how = dict(stderr=subprocess.PIPE, text=True, cwd=world, env=env)
    process = subprocess.Popen([*map(str, command)], **how)
    for _ in range(3000):
        if (world / "hangs").exists():
            break
        time.sleep(0.1)
    began = time.time()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=400)[1]
    assert time.time() - began < 150
    assert len(re.findall(r"asked to stop, and no step has ended for \d+ s: not saved", said)) == 2


@pytest.mark.slow
def test_a_refusal_is_said_once(world):
    """Catches the same line from every process, run together, and the others' tracebacks when only
    the first one reads what is damaged."""
    out = world / "damaged"
    shutil.copytree(world / "ddp_implicit", out)
    data = bytearray((out / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "last.pt").write_bytes(data)
    for flags, line in (
        (["--resume", world / "nowhere"], f"--resume {world}/nowhere: no last.pt there"),
        (["--resume", out], "last.pt: not a checkpoint as train.py wrote it (its bytes have"),
    ):
        done = torchrun(world, ROOT / "train.py", *flags, "--parallel", "fsdp")
        assert done.returncode != 0
        said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
        assert len(said) == 1 and line in said[0], done.stderr
        assert "RuntimeError" not in done.stderr


@pytest.mark.slow
def test_the_sigterm_of_a_batch_system_saves(world):
    """Catches hours of many GPUs that are lost when their time is over, processes that stop after
    different steps and wait for each other, and a checkpoint of a step that is half done."""
    out = world / "sigterm"
    flags = [*small_flags(world, out), "--steps", 100_000, "--save_every", 100_000]
    command = [*START, "2", ROOT / "train.py", *flags, "--parallel", "fsdp"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, cwd=world)
    for _ in range(3000):
        if (out / "log.jsonl").exists() and len(log(out)) > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=400)[1]
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


# ---------------------------------------------------------------------------------------------
# fsdp of one process


@pytest.fixture
def alone(monkeypatch):
    """This process, as torchrun would start it if it were the only one."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1").items():
        monkeypatch.setenv(name, str(value))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(found.getsockname()[1]))
    yield
    parallel.stop()


KILLS = {
    # what is called in a save, and after how many calls the kill comes
    "before the parts": ("dcp.save", 1),
    "in the parts": ("dcp.save half", 1),
    "before they are named": ("save_checkpoint", 1),
    "before the old ones go": ("shutil.rmtree", 0),
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_kill_at_any_moment_of_a_save_in_parts(alone, tmp_path, monkeypatch, kill):
    """Catches a last.pt that names parts which are not there, or parts of two saves; and parts of
    old saves that fill the disk."""
    data = make_data(tmp_path / "tiny")
    fsdp = dict(parallel="fsdp", batch=6, steps=6, save_every=2, decay=0.0, warmup=0)
    whole = run(data, tmp_path / "whole", **fsdp)
    out = tmp_path / "out"
    name, survives = KILLS[kill]
    calls = []

    def killing(function):
        def dies(*args, **how):
            if name == "save_checkpoint" and args[0].name != "last.pt":
                return function(*args, **how)
            calls.append(1)
            if len(calls) <= survives:
                return function(*args, **how)
            if "half" in name:
                how["checkpoint_id"].mkdir()
                (how["checkpoint_id"] / "__7_0.distcp").write_bytes(b"half")
            raise InterruptedError

        return dies

    with monkeypatch.context() as patch:
        if "dcp.save" in name:
            patch.setattr(parallel.dcp, "save", killing(parallel.dcp.save))
        elif name == "save_checkpoint":
            patch.setattr(train, "save_checkpoint", killing(train.save_checkpoint))
        else:
            patch.setattr(train.shutil, "rmtree", killing(shutil.rmtree))
        with pytest.raises(InterruptedError):
            run(data, out, **fsdp)
    step = read_checkpoint(out / "last.pt")[0]["meta"]["step"]
    assert step == (4 if kill == "before the old ones go" else 2)
    again = run(data, out, **fsdp)
    assert again["losses"] == whole["losses"][step:]
    a, b = open_last(tmp_path / "whole"), open_last(out)
    for key in ("model", "optimizer"):
        assert same(a[key], b[key])
    assert sorted(path.name for path in out.glob("last*")) == ["last.pt", "last_6"]
    assert "__7_0.distcp" not in [path.name for path in (out / "last_6").iterdir()]


def test_every_damaged_part_is_noticed(alone, tmp_path):
    """Catches a bit that flipped on the disk and trains on, and a pickle that is believed before
    its checksum."""
    data = make_data(tmp_path / "tiny")
    out = tmp_path / "out"
    run(data, out, steps=2, parallel="fsdp")
    cfg, _ = train.command_line(["--resume", str(out), "--steps", "3"])
    for part in (out / "last_2").iterdir():
        whole = part.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[at] ^= 4
            part.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{part.name} is damaged: its bytes have changed"):
                train.main(cfg)
        part.unlink()
        with pytest.raises(UserError, match=f"{part.name} is missing"):
            train.main(cfg)
        part.write_bytes(whole)
    assert train.main(cfg)["step"] == 3


def test_weights_in_parts_are_opened_by_the_run_alone(alone, tmp_path):
    """Catches a traceback where a command is given the last.pt of fsdp, and a cure that does not
    work: the printed command makes the model.pt of a run that was stopped."""
    data = make_data(tmp_path / "tiny")
    out = tmp_path / "out"
    run(data, out, steps=3, parallel="fsdp")
    weights = load_checkpoint(out)[0].state_dict()
    (out / "model.pt").unlink()
    with pytest.raises(UserError, match="last.pt: its weights lie beside it, in parts") as refusal:
        load_checkpoint(out / "last.pt")
    words = shlex.split(str(refusal.value).split("python train.py ")[1].split(" makes")[0])
    train.main(*train.command_line(words))
    assert same(dict(load_checkpoint(out)[0].state_dict()), dict(weights))


def test_weights_that_are_not_finite_are_not_saved_in_parts(alone, tmp_path):
    """Catches nan that is saved over the last good checkpoint."""
    data = make_data(tmp_path / "tiny")
    result = run(data, tmp_path / "out", steps=2, parallel="fsdp")
    model = result["model"]
    optimizer = train.make_optimizer(model, train.TrainConfig())
    train.first_states(optimizer)
    optimizer.state[model.norm.weight]["exp_avg"].to_local()[3] = float("inf")
    with pytest.raises(UserError, match="optimizer.norm.weight.exp_avg holds nan or infinite"):
        parallel.save_shards(tmp_path / "out" / "last_3", model, optimizer)
    assert not (tmp_path / "out" / "last_3").exists()


def test_parts_are_on_the_device_of_the_run(alone, tmp_path, monkeypatch):
    """Catches --device cpu on a machine with a GPU, which fsdp takes if nobody says where the
    parts belong."""
    meshes = []
    fully_shard = parallel.fully_shard

    def seen(module, mesh=None, **how):
        meshes.append(mesh)
        return fully_shard(module, mesh=mesh, **how)

    monkeypatch.setattr(parallel, "fully_shard", seen)
    run(make_data(tmp_path / "tiny"), tmp_path / "out", steps=1, parallel="fsdp")
    assert len(meshes) > 1 and {mesh.device_type for mesh in meshes} == {"cpu"}


def test_only_the_first_process_has_the_whole_model(tmp_path, monkeypatch):
    """Catches N copies of a model on a host with N GPUs: of a new one, of --init, of a run."""
    data = make_data(tmp_path / "tiny")
    first = tmp_path / "first"
    run(data, first, steps=1)
    init = str(first / "model.pt")
    for name, changes in (("new", {}), ("other", dict(init=init)), ("first", {})):
        cfg = options(data, tmp_path / name, "implicit", **changes) | dict(batch=4)
        cfg = train.TrainConfig(**cfg | dict(context=28))
        config, meta, state = train.open_run(cfg, shape(data), rank=0)
        assert sum(x.numel() for x in state["model"].values()) > config.n_params
        with monkeypatch.context() as patch:
            patch.delattr(model_module, "checksum")
            patch.setattr(train, "Memory3", None)
            patch.setattr(train, "load_checkpoint", None)
            there = train.open_run(cfg, shape(data), rank=1)
        assert there[:2] == (config, meta)
        if name != "first":  # of that, the tensors are in the file until they are copied
            assert there[2] == dict(model=None)
