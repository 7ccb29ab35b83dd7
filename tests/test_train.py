"""Training: batches, schedule, checkpoints, resume, divergence, and the command line.

The data set is made here, in a temporary directory: texts of a few tokens that repeat, with the
tokenizer of data/cities. Nothing is compared with numbers of an earlier run.
"""

import contextlib
import doctest
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY

import common
import corpus
import cost
import model as model_module
import retrieval
import train
from common import UserError
from model import Block, Config, Memory3, load_checkpoint, read_checkpoint, save_checkpoint
from optimizer import RoundedAdamW, first_states, round_at_random
from train import TrainConfig, Windows, recall_table

C, T = 7, 28  # 4 chunks a window
IMPLICIT = ("train", "val", "heldout")
EXPLICIT = ("explicit", "explicit_val", "explicit_heldout")


def pattern(n, seed, period=5):
    """n tokens that repeat a few: learnt in no time, and another few for another seed."""
    few = np.random.default_rng(seed).choice(np.arange(300, 4000), period, replace=False)
    return np.resize(few, n)


def put(data, split, tokens, seed=0):
    """Writes a split; an explicit one with random neighbours, of which a sixth are none."""
    corpus.write_tokens(data / f"{split}.bin", tokens, 4096)
    if split.startswith("explicit"):
        refs = corpus.References.open(data / "train_refs")
        n = len(tokens) // C
        rows = np.random.default_rng([7, seed]).integers(0, len(refs), (n, 2)).astype(np.int32)
        rows[:, 0][np.arange(n) % 6 == 4] = -1
        common.replace_file(data / f"{split}.neighbors.bin", lambda f: f.write(rows.tobytes()))
        meta = dict(chunk_len=C, k=2, n_chunks=n, n_tokens=len(tokens), name="train_refs")
        meta |= dict(context=T, threshold=0.9, tokens=retrieval.digest(tokens.astype("<u2")))
        common.write_json(data / f"{split}.neighbors.json", meta | dict(references=refs.hash))


def make_data(path):
    """10 windows and 3 tokens to train on, 5 windows to validate on, 9 references."""
    path.mkdir()
    shutil.copy(ROOT / "data" / "cities" / "tokenizer.json", path)
    common.write_json(path / "meta.json", dict(name="tiny", tokenizer=str(path), n_vocab=4096))
    rows = [pattern(n, seed=50 + n) for n in (13, 3, 11, 9, 1, 12, 4, 8, 10)]
    corpus.References.create(path / "train_refs", rows, 4096)
    for name in (*IMPLICIT, *EXPLICIT):
        put(path, name, pattern((10 * T if name in ("train", "explicit") else 5 * T) + 3, seed=1))
    return path


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "tiny")


def shape(data, **changes):
    tok = corpus.tokenizer(data)
    given = dict(TINY, vocab_size=tok.n_vocab, header=tuple(tok.header), tied=True)
    return Config(**{**given, **changes})


def settings(data, out, stage="implicit", **changes):
    given = dict(data=str(data), out=str(out), stage=stage, context=T, batch=4, steps=11, warmup=3)
    given |= dict(lr=1e-2, eval_every=5, save_every=4, device="cpu", dtype="float32")
    return TrainConfig(**{**given, **changes})


def run(data, out, stage="implicit", **changes):
    return train.main(settings(data, out, stage, **changes), shape(data))


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(a, b):
    """Whether two states are equal bit for bit, whatever they are nested in."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---------------------------------------------------------------------------------------------
# Batches


def test_windows_are_cut_and_shifted_right(data):
    """Catches targets off by one, a target from the next window, a BOS that is predicted or that
    overwrites a target, and neighbours of another window's chunks."""
    put(data, "explicit", np.arange(300, 300 + 10 * T + 3))
    cfg, config = settings(data, "", "explicit"), shape(data)
    windows = Windows(cfg, "explicit", config)
    assert windows.n == 10
    tokens, targets, references, recall = windows.batch([6, 0, 9])
    bos = corpus.tokenizer(data).bos
    for b, w in enumerate((6, 0, 9)):
        start = 300 + w * T
        assert tokens[b].tolist() == [bos, *range(start + 1, start + T)]
        assert targets[b].tolist() == [*range(start + 1, start + T), -1]
    rows = np.fromfile(data / "explicit.neighbors.bin", np.int32).reshape(-1, 2)
    refs = corpus.References.open(data / "train_refs")
    assert references.shape[0] == 3 * 4 and recall.shape == (3, 4, 4)
    for b, w in enumerate((6, 0, 9)):
        for c in range(4):
            i, row = rows[w * 4 + c, 0], references[b * 4 + c]
            assert i < 0 or row[row >= 0].tolist() == refs[i].tolist()
            assert (recall[b, c, 0] == b * 4 + c) == (i >= 0)
    assert windows.batch([6], full_width=True)[2].shape == (4, 13)
    plain = Windows(settings(data, ""), "train", config).batch([1, 2])
    assert plain[0].shape == (2, T) and plain[2] is None and plain[3] is None


def test_order_of_windows_depends_on_nothing_but_seed_and_position(data):
    """Catches an order that a resume would change, an epoch that leaves windows out, and the same
    order in every epoch."""
    order = {}
    for seed in (1, 2):
        windows = Windows(settings(data, "", seed=seed), "train", shape(data))
        order[seed] = [windows.window(i) for i in range(30)]
        for epoch in range(3):
            assert sorted(order[seed][10 * epoch : 10 * epoch + 10]) == list(range(10))
        jumped = [windows.window(i) for i in (29, 3, 14, 15, 2)]
        assert jumped == [order[seed][i] for i in (29, 3, 14, 15, 2)]
        assert order[seed][:10] != order[seed][10:20] != order[seed][20:]
    assert order[1] != order[2]


@pytest.mark.parametrize("shift", [0, 1])
def test_recall_table_is_that_of_the_paper(shift):
    """Catches a chunk that reads the future's reference, six chunks back instead of four, one
    reference twice in a softmax, -1 taken for the last reference (sec. 3.6: c-4..c)."""
    ids = np.random.default_rng(3).integers(-1, 6, (3, 11))
    recall = recall_table(ids, 5, shift)
    assert recall.shape == (3, 11, 5) and recall.dtype == torch.int64
    for b in range(3):
        for c in range(11):
            rows = [r for r in recall[b, c].tolist() if r >= 0]
            chunks = [r - 11 * b for r in rows]
            assert all(max(0, c - shift - 4) <= j <= c - shift for j in chunks)
            assert chunks == sorted(chunks, reverse=True)  # the latest copy of a reference
            want = {ids[b, j] for j in range(max(0, c - shift - 4), c - shift + 1)} - {-1}
            got = [ids[b, j] for j in chunks]
            assert set(got) == want and len(got) == len(want)


def test_data_that_does_not_fit_is_refused_in_one_line(data, tmp_path):
    """Catches tracebacks and silent defaults for what a newcomer gets wrong first."""
    config = shape(data)
    for changes, error, line in (
        (dict(data=tmp_path / "no"), UserError, "no/train.bin is missing: run python"),
        (dict(split="other"), UserError, "other.bin is missing: run python"),
        (dict(context=300), ValueError, "train.bin is shorter than one window of 300"),
        (dict(stage="explicit", context=30, split="explicit"), ValueError, "30 is no multiple of"),
        (dict(stage="explicit", split="train"), UserError, "no neighbours here; make them"),
    ):
        with pytest.raises(error, match=line) as e:
            cfg = settings(**{**dict(data=data, out=""), **changes})
            Windows(cfg, cfg.split, config)
        assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------
# Schedule and optimizer


def test_schedule_warms_up_stays_and_decays():
    """Catches a first step at zero, a last step that is not near zero, a warmup of no steps that
    divides by zero."""
    cfg = TrainConfig(steps=70, warmup=9, decay=0.2)
    lr = [train.lr_at(s, cfg) for s in range(70)]
    assert np.allclose(lr[:9], np.arange(1, 10) / 9)
    assert lr[9:56] == [1.0] * 47
    assert np.allclose(lr[56:], np.arange(14, 0, -1) / 14)
    for odd in (dict(warmup=0), dict(decay=0.0), dict(steps=1)):
        cfg = TrainConfig(**{**dict(steps=5, warmup=2), **odd})
        assert all(0 < train.lr_at(s, cfg) <= 1 for s in range(cfg.steps))


def test_every_weight_is_in_the_optimizer_once_and_only_matrices_decay(build):
    """Catches a forgotten parameter, a tied matrix that is stepped twice, decayed norms."""
    for tied in (True, False):
        model = build(torch.float32, tied=tied)
        groups = train.make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
        ours = [id(p) for g in groups for p in g["params"]]
        assert len(ours) == len(set(ours)) and set(ours) == {id(p) for p in model.parameters()}
        for g in groups:
            assert all((p.dim() > 1) == (g["weight_decay"] == 0.3) for p in g["params"])


@pytest.mark.parametrize("stage", ["implicit", "explicit"])
def test_flops_of_a_step_are_those_of_its_windows(data, tmp_path, stage, monkeypatch, capsys):
    """Catches FLOPs (and so an MFU) of the other stage, of max_context tokens instead of the
    window's 28, of one window instead of the batch, or of a time that is not the step's."""
    monkeypatch.setitem(train.PEAK, "", 1e9)  # "" is in every card's name, also in a CPU's
    run(data, tmp_path, stage, steps=2, batch=6, micro_batch=3)
    a_window = cost.step_flops(shape(data), stage == "explicit", T)
    assert f"{6 * a_window:.3g} FLOPs" in capsys.readouterr().out
    for row in log(tmp_path):
        assert math.isclose(row["mfu"] * 1e9 / a_window, row["tokens_per_s"] / T, rel_tol=1e-9)


def test_bfloat16_weights_are_rounded_right_on_average():
    """Catches rounding to the nearest, which loses every small step, noise of the wrong size, and
    a number that is a bfloat16 already and moves."""
    g = torch.Generator().manual_seed(5)
    exact = torch.tensor([1.0, -3.5, 2.0**-40, -0.0, 1e30]).bfloat16()
    for _ in range(20):
        assert torch.equal(round_at_random(exact.float(), g), exact)
    low, high = 1.0, 1.0078125  # neighbours in bfloat16
    for share in (0.1, 0.5, 0.83):
        for sign in (1, -1):
            x = torch.full((40_001,), sign * (low + share * (high - low)))
            got = round_at_random(x, g)
            assert set(got.abs().tolist()) == {low, high}
            up = (got.abs() == high).float().mean()
            assert abs(float(up) - share) < 0.015  # 6 standard deviations


def test_rounded_adamw_is_adamw_in_float32(build):
    """Catches a term of AdamW that was forgotten, a bias that is not corrected, decayed norms: with
    weights in float32 both optimizers take the same steps."""
    cfg = TrainConfig(lr=3e-3, weight_decay=0.3)
    ours, theirs = build(torch.float32), build(torch.float32)
    groups = train.make_optimizer(ours, cfg).param_groups
    fields = [dict(params=g["params"], weight_decay=g["weight_decay"]) for g in groups]
    optimizers = RoundedAdamW(fields, 3e-3, (0.9, 0.95), seed=1), train.make_optimizer(theirs, cfg)
    first_states(optimizers[0])
    for step in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p) * (1 + step)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stage", ["implicit", "explicit"])
def test_weights_in_bfloat16_learn_and_resume(data, tmp_path, stage):
    """Catches steps that rounding swallows: with an lr of 3e-4 beside weights of 0.02 to 1 the loss
    must fall as in float32. And states that a resume rounds to bfloat16, or other random numbers
    after it."""
    flags = dict(lr=3e-4, steps=24, save_every=9, eval_every=24)
    want = run(data, tmp_path / "float32", stage, **flags)["losses"]
    flags["param_dtype"] = "bfloat16"
    whole = run(data, tmp_path / "whole", stage, **flags)
    got = whole["losses"]
    assert got[-1] < got[0] - 0.8 * (want[0] - want[-1])
    with pytest.MonkeyPatch.context() as patch:
        lr_at = train.lr_at

        def killed(step, cfg, seconds):
            assert step < 11, "killed"
            return lr_at(step, cfg, seconds)

        patch.setattr(train, "lr_at", killed)
        with pytest.raises(AssertionError, match="killed"):
            run(data, tmp_path / "two", stage, **flags)
    again = train.main(*train.command_line(["--resume", str(tmp_path / "two")]))
    assert again["losses"] == got[9:]
    model = load_checkpoint(tmp_path / "two")[0]
    assert same(dict(model.state_dict()), dict(whole["model"].state_dict()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    states = read_checkpoint(tmp_path / "two" / "last.pt")[0]["optimizer"]
    assert {state["exp_avg_sq"].dtype for state in states.values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("stage", ["implicit", "explicit"])
def test_recomputing_changes_nothing(data, tmp_path, stage):
    """Catches a --recompute that is dropped, or that computes something else the second time."""
    plain = run(data, tmp_path / "a", stage, steps=3)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        forward = Block.forward
        patch.setattr(Block, "forward", lambda *args: calls.append(1) or forward(*args))
        again = run(data, tmp_path / "b", stage, steps=3, recompute=True)
        n = len(calls)
        run(data, tmp_path / "c", stage, steps=3)
    assert n > len(calls) - n  # each layer twice
    assert again["losses"] == plain["losses"] and again["val"] == plain["val"]


def test_minutes_end_a_run_with_its_decay(data, tmp_path, monkeypatch):
    """Catches a run that goes on after its time, an lr that has not decayed when it ends, a resume
    that gets the whole time again, steps that are counted although time is, and a --steps that a
    run begun with --minutes drops without a word."""
    clock = [1000.0]

    def tick():
        clock[0] += 1.0  # each look at the clock takes a second
        return clock[0]

    monkeypatch.setattr(train.time, "time", tick)
    flags = dict(minutes=2.0, decay=0.5, warmup=0, steps=1, eval_every=1000, save_every=5)
    result = run(data, tmp_path / "out", **flags)
    rows = log(tmp_path / "out")
    assert 20 < result["step"] == len(rows) < 120
    lr = [row["lr"] / 1e-2 for row in rows]
    assert lr[: len(lr) // 2 - 1] == [1.0] * (len(lr) // 2 - 1)
    assert sorted(lr, reverse=True) == lr and 0 < lr[-1] < 0.1
    meta = load_checkpoint(tmp_path / "out" / "last.pt")[1]
    assert 120 <= meta["seconds"] < 130
    clock[0] += 5000
    cfg, config = train.command_line(["--resume", str(tmp_path / "out"), "--minutes", "3"])
    more = train.main(cfg, config)["step"] - result["step"]
    assert result["step"] // 3 < more < result["step"]  # half the time again, all of it decaying
    cfg, _ = train.command_line(["--resume", str(tmp_path / "out"), "--steps", "500"])
    assert (cfg.steps, cfg.minutes) == (500, 0)


def test_measure_trains_and_saves_nothing(data, tmp_path):
    """Catches a speed of no training at all, or one that leaves files."""
    cfg = settings(data, tmp_path / "out", "explicit", batch=2)
    small = train.measure(cfg, shape(data))
    large = train.measure(cfg, shape(data, n_layer=40, mlp_width=400, n_kv_head=6))
    assert small > 1.5 * large > 0
    assert not (tmp_path / "out").exists()


def test_micro_batch_is_the_largest_that_fits(data, tmp_path, monkeypatch):
    """Catches a search that ends with a number of windows that does not divide the batch, that
    leaves gradients behind, that forgets those of the windows before, or that never ends where one
    window is too many."""
    model = Memory3(shape(data))
    cfg = settings(data, tmp_path, batch=12)
    windows = Windows(cfg, "train", model.config)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    # room: for so many windows; whether gradients that are there take the place of one
    for room, beside, want in ((99, 0, 12), (11, 0, 6), (6, 1, 3), (5, 0, 3), (2, 0, 1), (0, 0, 0)):
        device = SimpleNamespace(type="cuda")  # the search runs on a GPU only

        def step_loss(batch, device):
            there = model.norm.weight.grad is not None
            if len(batch[0]) + beside * there > room:  # noqa: B023
                raise torch.OutOfMemoryError
            return model(*batch[:2])[1]

        args = (windows, model, step_loss, contextlib.nullcontext(), device, 1)
        if want:
            assert train.fit_micro_batch(cfg, *args) == want
            assert all(p.grad is None for p in model.parameters())
            own = replace(cfg, micro_batch=2)
            assert train.fit_micro_batch(own, *args) == 2
        else:
            with pytest.raises(UserError, match="one window of 28 tokens does not fit"):
                train.fit_micro_batch(cfg, *args)


@pytest.mark.parametrize("fixed", [0, 300])
def test_micro_batch_under_fsdp_is_measured_and_never_too_much(data, tmp_path, monkeypatch, fixed):
    """Catches a trial that runs out of memory, which fsdp does not survive, one that stops far
    below what fits, and bytes that are counted twice. A GPU that counts 40 bytes a window, and
    `fixed` bytes in another part of the step, where the peak is if there are few windows."""
    model = Memory3(shape(data))
    windows = Windows(settings(data, tmp_path, batch=24), "train", model.config)
    gpu = SimpleNamespace(peak=0, tried=[])
    device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1200)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gpu.peak)
    # beside 300 bytes of 400 it does not dare to try two windows: they could take 600
    for room, want in ((4000, 24), (700, 12), (400, 1 if fixed else 8)):
        free = room / 0.95 - 200  # of the rest PyTorch has 200 bytes already
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))  # noqa: B023
        gpu.tried = []

        def step_loss(batch, device):
            n = len(batch[0])
            gpu.tried.append(n)
            gpu.peak = 1000 + max(40 * n, fixed + 2 * n)
            assert gpu.peak - 1000 < room, "out of memory"  # noqa: B023
            return model(*batch[:2])[1]

        cfg = settings(data, tmp_path, batch=48, parallel="fsdp")
        args = (windows, model, step_loss, contextlib.nullcontext(), device, 2)
        assert train.fit_micro_batch(cfg, *args) == want
        assert all(p.grad is None for p in model.parameters())
        assert len(gpu.tried) <= 10


@pytest.mark.parametrize("stage", ["implicit", "explicit"])
def test_loss_falls_in_both_stages(data, tmp_path, stage):
    """Catches a step that does not train: no gradient, targets of other tokens, lr of zero."""
    result = run(data, tmp_path / "out", stage, steps=25, eval_every=25)
    assert result["step"] == 25 and len(result["losses"]) == 25
    assert abs(result["losses"][0] - math.log(4096)) < 0.3  # knows nothing at first
    assert result["losses"][-1] < 2.5  # of 8.3; a uniform guess among the five is 1.6
    rows = log(tmp_path / "out")
    assert [r["step"] for r in rows] == list(range(1, 26))
    assert [r["loss"] for r in rows] == result["losses"] and rows[-1]["val"] == result["val"]


def test_validation_is_the_loss_of_the_validation_files(data, tmp_path):
    """Catches validation on training data: other training text changes nothing (lr is 0), other
    validation text does. And a mean that weighs a short last batch, of 1, like a full one, of 2."""
    still = dict(lr=0.0, steps=1, micro_batch=2, eval_batches=9)
    before = run(data, tmp_path / "a", **still)
    put(data, "train", pattern(10 * T, seed=2))
    after = run(data, tmp_path / "b", **still)
    assert before["losses"] != after["losses"] and before["val"] == after["val"]
    put(data, "heldout", np.random.default_rng(4).integers(300, 4000, 5 * T))
    third = run(data, tmp_path / "c", **still)["val"]
    assert third["val"] == before["val"]["val"] and third["heldout"] != before["val"]["heldout"]
    windows = Windows(settings(data, ""), "heldout", before["model"].config)
    with torch.no_grad():
        by_hand = [train.loss_on(before["model"], windows.batch([w]), "cpu") for w in range(5)]
    assert abs(third["heldout"] - float(sum(by_hand)) / 5) < 1e-5


def test_explicit_validation_is_with_and_without_what_was_recalled(data, tmp_path):
    """Catches a "nothing recalled" that recalls, and memories of other chunks in validation."""
    result = run(data, tmp_path / "out", "explicit", steps=9, micro_batch=2, eval_batches=1)
    val, model = result["val"], result["model"]
    assert list(val) == [n + x for n in EXPLICIT[1:] for x in ("", ", nothing recalled")]
    windows = Windows(settings(data, "", "explicit"), "explicit_val", model.config)
    with torch.no_grad():
        tokens, targets, references, recall = windows.batch(range(4))  # a batch, in two passes
        logits = model(tokens, None, model.write(references), recall)[0]
        empty = model(tokens, None, model.write(references))[0]
    for x, name in ((logits, "explicit_val"), (empty, "explicit_val, nothing recalled")):
        by_hand = F.cross_entropy(x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert abs(val[name] - float(by_hand)) < 1e-5
    assert val["explicit_val"] != val["explicit_val, nothing recalled"]


@pytest.mark.parametrize("stage", ["implicit", "explicit"])
def test_micro_batches_add_up_to_the_batch(data, tmp_path, stage):
    """Catches gradients that are summed instead of averaged, windows read twice or skipped; a
    validation of fewer windows where fewer fit."""
    logs = []
    small = dict(steps=4, lr=1e-3, eval_batches=1)
    for micro in (4, 2, 1):
        run(data, tmp_path / str(micro), stage, micro_batch=micro, **small)
        logs.append(log(tmp_path / str(micro)))
    for rows in logs[1:]:
        assert rows[-1]["val"] == pytest.approx(logs[0][-1]["val"], rel=1e-5)
        for a, b in zip(logs[0], rows, strict=True):
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)
            assert math.isclose(a["norm"], b["norm"], rel_tol=1e-3)


def test_only_the_text_is_in_the_loss_and_the_writer_gets_its_gradient(data):
    """Catches references as targets, and memories that are detached in the training step: the
    gradient of a token that stands in no text, only in references (invariant 8)."""
    torch.manual_seed(0)
    model = Memory3(shape(data, tied=False))
    windows = Windows(settings(data, "", "explicit"), "explicit", model.config)
    batch = windows.batch([0, 1, 2])
    loss = train.loss_on(model, batch, torch.device("cpu"))
    tokens, targets, references, recall = batch
    logits = model(tokens, None, model.write(references), recall)[0]
    by_hand = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, by_hand, rtol=1e-6, atol=0)
    loss.backward()
    text = {*tokens.unique().tolist(), *model.config.header}
    read = references[recall[recall >= 0].unique()]
    grad = model.embed.weight.grad.abs().amax(-1)
    only_there = [t for t in read[read >= 0].unique().tolist() if t not in text]
    assert len(only_there) > 20 and (grad[only_there] > 0).all()
    nowhere = [t for t in range(4096) if t not in text and t not in references]
    assert (grad[nowhere] == 0).all()
    # in the output matrix a token that is no target is only pushed down: p > 0, nothing minus
    logits.retain_grad()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1).backward()
    assert (logits.grad[:, :-1][..., only_there] > 0).all() and (logits.grad[:, -1] == 0).all()


# ---------------------------------------------------------------------------------------------
# Checkpoints and resume


@pytest.mark.parametrize("stage", ["implicit", "explicit"])
def test_resume_is_bit_exact(data, tmp_path, stage, monkeypatch):
    """Catches an optimizer, a data position, a best loss or a schedule that a resume starts anew:
    stopped at step 9 of 11 (saved at 8, in the middle of an epoch), the rest is the same, bit for
    bit."""
    whole = run(data, tmp_path / "whole", stage, micro_batch=2)
    lr_at = train.lr_at

    def stop(step, cfg, seconds):
        if step == 9:
            raise KeyboardInterrupt
        return lr_at(step, cfg, seconds)

    monkeypatch.setattr(train, "lr_at", stop)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "two", stage, micro_batch=2)
    monkeypatch.setattr(train, "lr_at", lr_at)
    assert load_checkpoint(tmp_path / "two" / "last.pt")[1]["step"] == 8
    result = train.main(*train.command_line(["--resume", str(tmp_path / "two")]))
    assert result["step"] == 11 and result["losses"] == whole["losses"][8:]
    assert result["val"] == whole["val"]
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(tmp_path / d / name, weights_only=True) for d in ("whole", "two"))
        assert ("optimizer" in a) == (name == "last.pt")
        for key in a.keys() - {"meta"}:
            assert same(a[key], b[key])
        for meta in (a["meta"], b["meta"]):
            meta["train"].pop("out")
        assert same(a["meta"], b["meta"])


def test_damaged_last_is_not_resumed(data, tmp_path):
    """Catches a bit of the weights, of the optimizer or of the position that flipped on the disk
    and trains on unnoticed."""
    run(data, tmp_path / "out", steps=2)
    last = tmp_path / "out" / "last.pt"
    whole = last.read_bytes()
    for bit in np.random.default_rng(8).integers(0, 8 * len(whole), 60).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        last.write_bytes(damaged)
        with pytest.raises(UserError, match="last.pt: not a checkpoint as train.py wrote it"):
            run(data, tmp_path / "out", steps=3)
    last.write_bytes(whole)
    assert run(data, tmp_path / "out", steps=3)["step"] == 3


def test_a_kill_leaves_no_step_twice_and_nothing_half_written(data, tmp_path, monkeypatch):
    """Catches a log in which the steps after the last checkpoint stand twice, a half row that the
    next one is appended to, and .tmp files that stay for ever."""
    out = tmp_path / "out"
    lr_at = train.lr_at

    def killed(step, cfg, seconds):
        assert step < 7, "killed"
        return lr_at(step, cfg, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(train, "lr_at", killed)
        with pytest.raises(AssertionError, match="killed"):
            run(data, out, save_every=3)
    with open(out / "log.jsonl", "a") as file:
        file.write('\0\0\n[]\n{"step": 8, "loss": 2.')
    (out / "best.pt.tmp").write_bytes(b"half")
    assert (out / "log.jsonl").read_text().count("\n") == 7 + 2  # a step after the checkpoint
    run(data, out, save_every=3)
    assert [row["step"] for row in log(out)] == list(range(1, 12))
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path, number, monkeypatch):
    """Catches a Ctrl-C that loses what was trained since the last checkpoint, a step that is half
    done, a promise of a resume without a checkpoint, and a handler that stays."""
    whole = run(data, tmp_path / "whole")
    before = signal.getsignal(number)
    loss_on = train.loss_on
    calls = []

    def interrupted(model, batch, device):
        if model.training and torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 6:
                signal.raise_signal(number)
        return loss_on(model, batch, device)

    out = tmp_path / "two words"
    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_on", interrupted)
        with pytest.raises(KeyboardInterrupt, match="after step 6, which is saved; go on") as stop:
            run(data, out)
    assert signal.getsignal(number) == before
    assert load_checkpoint(out / "last.pt")[1]["step"] == 6
    command = shlex.split(str(stop.value).split("python train.py ")[1])
    result = train.main(*train.command_line(command))
    assert result["losses"] == whole["losses"][6:]
    assert same(dict(result["model"].state_dict()), dict(whole["model"].state_dict()))


def test_a_second_ctrl_c_ends_at_once(data, tmp_path, monkeypatch):
    """Catches a run that cannot be stopped while a step hangs."""

    def twice(model, batch, device):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(train, "validate", lambda *rest: {"val": 1.0})
    monkeypatch.setattr(train, "loss_on", twice)
    with pytest.raises(KeyboardInterrupt) as stop:
        run(data, tmp_path / "out")
    assert str(stop.value) == "" and not (tmp_path / "out" / "last.pt").exists()


def test_last_is_the_end_and_best_is_the_best(data, tmp_path):
    """Catches nothing saved at the end (steps is no multiple of save_every), a best that is only
    the last, names with the prefix of torch.compile, half-written files left behind."""
    put(data, "val", pattern(5 * T, seed=3))  # what training makes less likely with every step
    run(data, tmp_path, steps=7, eval_every=2, save_every=5, lr=1e-2, warmup=0)
    best, last = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("best", "last"))
    losses = {r["step"]: r["val"]["val"] for r in log(tmp_path) if "val" in r}
    assert list(losses) == [2, 4, 6, 7] and last["meta"]["step"] == 7
    assert best["meta"]["step"] == min(losses, key=losses.get) < 7
    assert best["meta"]["best"] == last["meta"]["best"] == min(losses.values())
    assert not same(best["model"], last["model"])
    for state in (best, last):
        assert not [k for k in state["model"] if "_orig_mod" in k]
        assert Memory3(Config.from_dict(state["meta"]["config"])).load_state_dict(state["model"])
        assert state["meta"]["tokenizer"] == corpus.tokenizer(data).id
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["step"] == 7 and meta["stage"] == "implicit" and meta["config"]["n_layer"] == 4
    assert not list(tmp_path.glob("*.tmp"))
    # what write.py, sample.py and eval.py open: the same weights, without the optimizer
    model, meta = load_checkpoint(tmp_path)
    end = torch.load(tmp_path / "last.pt", weights_only=True)
    assert same(dict(model.state_dict()), end["model"]) and meta == end["meta"]
    assert "optimizer" not in torch.load(tmp_path / "model.pt", weights_only=True)


def test_keeps_copies_of_the_weights(data, tmp_path):
    """Catches copies that are all the last weights, or that carry the optimizer (three times the
    bytes), and a default that fills the disk."""
    run(data, tmp_path / "a", steps=7, keep_every=3, save_every=5)
    assert sorted(p.name for p in (tmp_path / "a").glob("step_*")) == ["step_3.pt", "step_6.pt"]
    for n in (3, 6):
        path = tmp_path / "a" / f"step_{n}.pt"
        model, meta = load_checkpoint(path)
        assert meta["step"] == n and {*torch.load(path, weights_only=True)} == {"model", "meta"}
        # with warmup over and no decay reached, the weights after n steps are a run's of n steps
        there = run(data, tmp_path / f"b{n}", steps=n, decay=0.0)["model"].state_dict()
        assert same(dict(model.state_dict()), dict(there))
    assert not list((tmp_path / "b3").glob("step_*"))


def test_compile_changes_no_loss_and_no_name_in_files(data, tmp_path, monkeypatch):
    """Catches a --compile that nothing runs: traced, but without a compiler (backend "eager"), the
    explicit stage has the same losses, and its checkpoint names weights as always."""
    plain = run(data, tmp_path / "a", "explicit", steps=3, lr=1e-3)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model_module.fused_parts.cache_clear()
    traced = run(data, tmp_path / "b", "explicit", steps=3, lr=1e-3, compile=True)
    assert model_module.fused_parts.cache_info().hits > 0
    model_module.fused_parts.cache_clear()
    assert np.allclose(plain["losses"], traced["losses"], rtol=1e-5)
    a, b = (torch.load(tmp_path / d / "last.pt", weights_only=True) for d in "ab")
    assert a["model"].keys() == b["model"].keys()


def test_without_a_compiler_it_runs_on(data, tmp_path, monkeypatch, capsys):
    """Catches --compile that ends the run on a machine without a C++ compiler, or that does not
    say that nothing was compiled."""
    plain = run(data, tmp_path / "a", steps=2)

    def no_compiler(function, **options):
        def fail(*args):
            raise RuntimeError("no working C++ compiler found\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    result = run(data, tmp_path / "b", steps=2, compile=True)
    assert result["losses"] == plain["losses"]
    line = "--compile: runs on without, as nothing can be compiled here (no working C++ compiler"
    assert line in capsys.readouterr().out


def test_a_kill_while_saving_leaves_the_last_checkpoint(data, tmp_path, monkeypatch):
    """Catches a checkpoint that is written in place: a kill halfway must leave the one before."""
    save = torch.save

    def killed(state, f):
        if state["meta"]["step"] == 8:
            f.write(b"half a file")
            raise KeyboardInterrupt
        save(state, f)

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out" / "last.pt")[1]["step"] == 4


def test_explicit_stage_starts_from_the_implicit_one(data, tmp_path):
    """Catches an --init that loses the weights, keeps the old step, or takes another shape."""
    first = run(data, tmp_path / "a", steps=3)["model"].state_dict()
    init = str(tmp_path / "a" / "last.pt")
    for stage in ("explicit", "implicit"):
        cfg = settings(data, tmp_path / stage, stage, steps=2, lr=0.0, init=init)
        result = train.main(cfg)
        assert result["step"] == 2 and same(dict(first), dict(result["model"].state_dict()))
    # the memories' shape is free to change between the stages, that of the weights is not
    argv = ["--init", init, "--data", str(data), "--stage", "explicit"]
    cfg, config = train.command_line([*argv, "--n_memory_layer", "1", "--memory_tokens", "2"])
    assert (config.n_memory_layer, config.memory_tokens) == (1, 2)
    cfg = settings(data, tmp_path / "free", "explicit", steps=1, lr=0.0, init=init)
    result = train.main(cfg, config)
    assert result["model"].config == config
    assert same(dict(first), dict(result["model"].state_dict()))
    with pytest.raises(ValueError, match="--n_layer: a checkpoint has its shape already"):
        train.command_line([*argv, "--n_layer", "2"])
    for changes in (dict(vocab_size=4095, header=(4094,)), dict(header=(4094, 7))):
        other = Memory3(shape(data, **changes))
        meta = dict(config=vars(other.config), stage="implicit", step=1)
        save_checkpoint(tmp_path / "other.pt", other.state_dict(), meta)
        with pytest.raises(ValueError, match="the checkpoint's tokenizer is not that of"):
            train.main(settings(data, tmp_path / "c", init=str(tmp_path / "other.pt")))


def test_out_of_another_run_is_not_continued(data, tmp_path):
    """Catches a run of another stage or shape that silently goes on with what lies in --out."""
    run(data, tmp_path / "out", steps=2)
    with pytest.raises(ValueError, match="of a run with --stage implicit, not explicit: choose"):
        run(data, tmp_path / "out", "explicit", steps=3)
    with pytest.raises(ValueError, match="another shape.*choose another --out"):
        train.main(settings(data, tmp_path / "out", steps=3), shape(data, n_layer=5))
    assert run(data, tmp_path / "out", steps=3)["step"] == 3  # the same run goes on


def test_a_run_follows_its_text_and_takes_no_other(data, tmp_path):
    """Catches a run that cannot go on because its data set was moved, and one that goes on with
    another text of the same length."""
    run(data, tmp_path / "out", steps=2, save_every=2, decay=0.0, warmup=0)
    again = run(data, tmp_path / "again", steps=4, decay=0.0, warmup=0)
    moved = data.rename(tmp_path / "moved")
    flags = ["--resume", str(tmp_path / "out"), "--steps", "4", "--data", str(moved)]
    result = train.main(*train.command_line(flags))
    assert result["losses"] == again["losses"][2:]
    put(moved, "train", pattern(10 * T + 3, seed=2))
    with pytest.raises(UserError, match="train.bin is not the text of this run: 283 tokens"):
        train.main(*train.command_line([*flags, "--steps", "5"]))


def test_weights_alone_are_no_run(data, tmp_path):
    """Catches a model.pt renamed to last.pt that ends in a traceback, and an --out that is a
    file."""
    run(data, tmp_path / "out", steps=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "out" / "model.pt").rename(tmp_path / "other" / "last.pt")
    assert load_checkpoint(tmp_path / "other" / "last.pt")[1]["step"] == 1
    for resume in (True, False):
        with pytest.raises(UserError, match="last.pt holds weights alone, no run: --init"):
            if resume:
                train.main(*train.command_line(["--resume", str(tmp_path / "other")]))
            run(data, tmp_path / "other", steps=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.* cannot be made a directory"):
        run(data, tmp_path / "file")


# ---------------------------------------------------------------------------------------------
# Divergence


def break_loss(monkeypatch, at, how):
    """The loss of training step `at` (counted over the calls, from 1) becomes how(loss, model)."""
    calls, loss_on = [], train.loss_on

    def broken(model, batch, device):
        loss = loss_on(model, batch, device)
        if model.training and torch.is_grad_enabled():
            calls.append(1)
            assert len(calls) < 30, "it goes back for ever"
            if len(calls) == at:
                return how(loss, model)
        return loss

    monkeypatch.setattr(train, "loss_on", broken)
    return calls


NAN = dict(
    loss=lambda loss, model: loss * math.nan,
    gradient=lambda loss, model: loss + (model.norm.weight * 0).sum().sqrt() * 0,  # 0 * inf
)


@pytest.mark.parametrize("where", NAN)
def test_divergence_stops_with_one_line_and_harms_nothing(data, tmp_path, where, monkeypatch):
    """Catches weights that turn into nan and are saved over the good checkpoint."""
    break_loss(monkeypatch, 7, NAN[where])
    with pytest.raises(UserError, match=r"step 6: .*nan.*smaller --lr") as e:
        run(data, tmp_path)
    assert "\n" not in str(e.value)
    model, meta = load_checkpoint(tmp_path / "last.pt")
    assert meta["step"] == 4 and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("where", NAN)
def test_back_off_returns_to_the_checkpoint_with_a_smaller_lr(data, tmp_path, where, monkeypatch):
    """Catches nan gradients that stay and spoil every step after the return, a scale that is not
    applied or not saved, the same batch tried again, an optimizer that does not go back: the end
    must be that of a run resumed at the checkpoint, with half the lr and the data after the bad
    batch."""
    flags = dict(back_off=0.5, warmup=0, decay=0.0)
    with monkeypatch.context() as m:
        calls = break_loss(m, 7, NAN[where])
        result = run(data, tmp_path, **flags)
    assert result["step"] == 11 and len(calls) == 6 + 1 + 7  # 6 steps, the bad one, 5..11 again
    assert all(p.isfinite().all() for p in result["model"].parameters())
    rows = log(tmp_path)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6, *range(5, 12)]
    assert [r["lr"] for r in rows[:6]] == [1e-2] * 6 and [r["lr"] for r in rows[6:11]] == [5e-3] * 5
    meta = load_checkpoint(tmp_path / "last.pt")[1]
    assert meta["lr_scale"] == 0.5 and meta["position"] == 14 * 4

    run(data, tmp_path / "again", **flags | dict(steps=4))
    state = torch.load(tmp_path / "again" / "last.pt", weights_only=True)
    state["meta"] |= dict(lr_scale=0.5, position=7 * 4)
    save_checkpoint(
        tmp_path / "again" / "last.pt", state["model"], state["meta"], state["optimizer"]
    )
    again = run(data, tmp_path / "again", **flags)
    assert same(dict(result["model"].state_dict()), dict(again["model"].state_dict()))


@pytest.mark.parametrize("back_off", [0.0, 0.25])
def test_a_spike_counts_as_divergence_only_when_asked_to(data, tmp_path, back_off, monkeypatch):
    """Catches a guard that is on by default, or one that compares with a mean the spike is in."""
    values = [2.0 + 0.01 * (i % 3) for i in range(103)] + [9.0] + [2.0] * 40
    steps = iter(values)

    def cheap(model, batch, device):  # a loss without the model, so that 100 steps cost nothing
        one = 0 * model.norm.weight.sum()
        return one + (next(steps) if torch.is_grad_enabled() else 2.0)

    monkeypatch.setattr(train, "loss_on", cheap)
    run(data, tmp_path, steps=110, batch=1, save_every=50, back_off=back_off, eval_every=200)
    losses = [r["loss"] for r in log(tmp_path)]
    assert (9.0 in losses) == (back_off == 0) and len(losses) == (110 if back_off == 0 else 113)
    assert load_checkpoint(tmp_path / "last.pt")[1]["lr_scale"] == (back_off or 1.0)


# ---------------------------------------------------------------------------------------------
# Command line


def test_flags_override_the_preset_and_the_tokenizer_gives_the_vocabulary(data):
    """Catches a flag that is dropped, and a preset that wins over a flag."""
    argv = ["--preset", "toy", "--data", str(data), "--stage", "explicit", "--steps", "9"]
    cfg, config = train.command_line([*argv, "--lr", "3e-4", "--n_layer", "5", "--compile"])
    tok = corpus.tokenizer(data)
    assert (cfg.steps, cfg.lr, cfg.stage, cfg.compile) == (9, 3e-4, "explicit", True)
    assert (cfg.split, cfg.val) == ("explicit", "explicit_val,explicit_heldout")
    toy = dict(n_layer=5, vocab_size=4096, header=tuple(tok.header))
    assert config == Config.preset("toy", **toy)
    assert train.command_line(argv)[0] == TrainConfig(data=str(data), stage="explicit", steps=9)


RANGES = dict(
    context=(0, "from 1 to 16,777,216"),
    batch=(0, "from 1"),
    micro_batch=(-1, "from 0"),
    steps=(0, "from 1"),
    minutes=(-0.5, "from 0"),
    lr=(math.nan, "from 0 to 10"),
    warmup=(-1, "from 0"),
    decay=(1.5, "from 0 to 1"),
    weight_decay=(-0.1, "from 0"),
    beta2=(1.0, "from 0 to 0.999999"),
    grad_clip=(-1.0, "from 0"),
    query_shift=(2, "from 0 to 1"),
    eval_every=(0, "from 1"),
    eval_batches=(0, "from 1"),
    save_every=(-3, "from 1"),
    keep_every=(-1, "from 0"),
    back_off=(1.0, "from 0 to 0.99"),
    seed=(-1, "from 0"),
)


def test_every_number_has_its_range():
    """Catches a number that freezes training, climbs, or fails later under another name: of each
    field, something outside of its range, nan and infinity are refused by the flag's name."""
    numbers = {f.name for f in fields(TrainConfig) if isinstance(f.default, int | float)}
    numbers -= {f.name for f in fields(TrainConfig) if isinstance(f.default, bool)}
    assert numbers == set(RANGES)
    for name, (value, line) in RANGES.items():
        for wrong in (value, math.inf, math.nan):
            with pytest.raises(UserError, match=f"^--{name} {wrong}: give a") as error:
                TrainConfig(**{name: wrong})
            assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=f"^--{name} .*{line}"):
            TrainConfig(**{name: value})
        with pytest.raises(UserError, match=f"^--{name} many: give a"):
            TrainConfig(**{name: "many"})


def test_numbers_of_numpy_are_saved_as_pythons(data, tmp_path):
    """Catches a checkpoint that is saved and cannot be opened, for it holds a NumPy number."""
    numbers = dict(lr=np.float32(0.25), steps=np.int64(1), seed=np.uint8(3), compile=np.False_)
    result = train.main(settings(data, tmp_path / "out", **numbers), shape(data))
    assert result["step"] == 1
    meta = load_checkpoint(tmp_path / "out")[1]["train"]
    assert {name: type(meta[name]) for name in numbers} == dict(
        lr=float, steps=int, seed=int, compile=bool
    )


def test_grad_clip_0_clips_nothing(data, tmp_path):
    """Catches a 0 that scales every gradient to nothing, so that training stands still."""
    off = run(data, tmp_path / "off", steps=3, grad_clip=0.0)
    high = run(data, tmp_path / "high", steps=3, grad_clip=1e6)
    assert off["losses"] == high["losses"] and off["losses"][-1] < off["losses"][0]


def test_a_model_beyond_this_machine_is_refused_before_it_is_made(data, tmp_path):
    """Catches gigabytes that are allocated, and then an error of PyTorch's."""
    huge = shape(data, n_layer=300, n_head=160, head_dim=128, mlp_width=5000)
    with pytest.raises(UserError, match="GB of weights, .* GB of memory"):
        train.main(settings(data, tmp_path / "out"), huge)


def test_what_cannot_be_run_is_one_line(data, tmp_path, capsys):
    """Catches options that are accepted and dropped, and errors that name neither flag nor cure."""
    have, toy = ["--data", str(data)], ["--preset", "toy"]
    run(data, tmp_path / "done", steps=1)
    init = ["--init", str(tmp_path / "done" / "last.pt")]
    resume = ["--resume", str(tmp_path / "done")]
    for argv, line in (
        ([*have], "--preset is missing: toy, small"),
        ([*have, *toy, "--n_memory_layer", "7"], "n_memory_layer 7 > n_layer 6"),
        ([*have, *toy, "--batch", "6", "--micro_batch", "4"], "--batch 6: no multiple of"),
        ([*toy, "--data", str(tmp_path / "nowhere")], "nowhere/meta.json is missing: run python"),
        (["--resume", str(tmp_path)], f"--resume {tmp_path}: no last.pt there"),
        ([*have, *toy, "--steps", "5", "--minutes", "1"], "--minutes and --steps: give one"),
        ([*resume, "--n_layer", "3"], "n_layer.*shape"),
        ([*have, *init, "--n_layer", "3"], "n_layer.*shape"),
        ([*have, *init, *toy], "preset.*shape"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=line) as e:
            train.command_line(argv)
        assert "\n" not in str(e.value)
    unknown = (["--stepz", "3"], ["--step", "3"], ["--steps", "three"])  # no abbreviations
    choices = (["--stage", "sft"], ["--dtype", "float8"], ["--preset", "big"])
    for argv in (*unknown, *choices):
        with pytest.raises(SystemExit):
            train.command_line([*have, *toy, *argv])
        assert argv[0] in capsys.readouterr().err


def test_help_shows_the_defaults_of_the_preset(capsys):
    """Catches "(default 44)" beside --n_layer of a model that has 6 layers."""
    for preset, n_layer in (("toy", 6), ("small", 12), (None, 44)):
        with pytest.raises(SystemExit):
            train.command_line(["--preset", preset, "--help"] if preset else ["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"--n_layer N_LAYER L (default {n_layer})" in text
        assert "--steps STEPS of the optimizer, in all (default 1000)" in text


def test_one_run_at_a_time(data, tmp_path, monkeypatch):
    """Catches two runs that write one last.pt and one log in turn, and a file of somebody else that
    goes because its name looks like one that a kill has left."""
    monkeypatch.setattr(train, "WAIT", 0.1)
    out = tmp_path / "out"
    with common.lock(out):
        with pytest.raises(UserError, match="out: another process has been working there"):
            run(data, out, steps=1)
        assert [path.name for path in out.iterdir()] == ["lock"]
    for name in ("notes.tmp", "last.pt.tmp", "step_3.pt.tmp", "meta.json.tmp"):
        (out / name).write_text("half")
    run(data, out, steps=1)
    assert [path.name for path in out.glob("*.tmp")] == ["notes.tmp"]


def test_the_dtype_that_is_said_is_that_of_the_products(data, tmp_path, capsys):
    """Catches "float32 (asked for)" where weights in bfloat16 are multiplied in bfloat16."""
    run(data, tmp_path / "out", steps=1, param_dtype="bfloat16")
    assert "torch.bfloat16 (that of the weights)" in capsys.readouterr().out


def test_help_explains_every_flag(capsys):
    """Catches a field without a comment: its flag would have no help."""
    with pytest.raises(SystemExit):
        train.command_line(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for word in [*vars(TrainConfig()), *vars(Config())]:
        if word not in ("vocab_size", "header"):
            assert f"--{word} " in text
            after = text.split(f"--{word} ")[-1].removeprefix(word.upper()).strip()
            after = re.sub(r"^\{.*?\} ", "", after)  # the values of a flag that has choices
            assert not after.startswith(("(default", "--", "or ")), word


def test_command_line_trains_resumes_and_fails_in_one_line(data, tmp_path):
    """Catches a script that only works when imported."""

    def python(*argv):
        command = [sys.executable, str(ROOT / "train.py"), *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)

    flags = ["--data", data, "--preset", "toy", "--context", 64, "--batch", 2, "--steps", 2]
    done = python(*flags, "--out", tmp_path / "out", "--n_layer", 5, "--eval_batches", 1)
    assert done.returncode == 0, done.stderr
    for word in ("non-embedding", "bytes in bfloat16", "attention:", "validation:", "step 2/2"):
        assert word in done.stdout
    assert load_checkpoint(tmp_path / "out" / "last.pt")[1]["step"] == 2
    failed = python(*flags, "--out", tmp_path / "out2", "--val", "other")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.startswith("train.py: ") and failed.stderr.count("\n") == 1


def test_worked_examples():
    """Catches docstrings that show what the code no longer does."""
    result = doctest.testmod(train)
    assert result.attempted >= 3 and result.failed == 0
