"""experiments/two_stages.py: its text, its measure, its runs in miniature, its tables."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import corpus
import memory
import model as decoder
import train
from common import UserError

sys.path.insert(0, str(ROOT / "experiments"))
import two_stages  # noqa: E402

TEXTS = ("train", "val")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A small data set: 300 people, 100 of them held out; 70 validation documents."""
    path = tmp_path_factory.mktemp("two_stages")
    two_stages.prepare(path / "data", 24, 70, 300, 100)
    return path


def facts_of(rows):
    """Per row the set of its facts, tuples of 4 tokens."""
    return [{tuple(r[i : i + 4]) for i in range(1, two_stages.T - 3, 4)} for r in rows.tolist()]


def test_validation_people_are_in_no_training_text_but_in_the_references(out):
    """Bug: held-out people in the training text, so that weights could know what memories tell."""
    rows = {s: corpus.open_tokens(out / "data", s).reshape(-1, two_stages.T) for s in TEXTS}
    names = {s: {f[:2] for row in facts_of(rows[s]) for f in row} for s in TEXTS}
    assert len(names["train"]) > 50 and len(names["val"]) > 50
    assert not names["train"] & names["val"]
    references = corpus.References.open(out / "data/kb")
    written = {tuple(references[i][j : j + 4]) for i in range(300) for j in range(0, 24, 4)}
    assert set.union(*facts_of(rows["val"])) <= written


def test_most_first_mentions_can_be_read_in_a_memory(out):
    """Bug: neighbours of other chunks than those that read them, or of the wrong people."""
    cfg = train.TrainConfig(data=f"{out}/data", stage="explicit", val="val", context=two_stages.T)
    config = shape(out, n_recall=1)
    tokens, _, references, recall = train.Windows(cfg, "val", config).batch(range(70))
    first, _ = two_stages.mentions(tokens.numpy())
    pool = [{tuple(r[i : i + 4]) for i in range(0, 24, 4)} for r in references.tolist()]
    told = []  # not all: a chunk recalls one reference, and may speak of three people
    for row, j in first.nonzero().tolist():  # token j + 1 is a value
        fact = tuple(tokens[row, j - 2 : j + 2].tolist())
        seen = recall[row, j // two_stages.C].tolist()  # it is predicted at token j
        told.append(any(fact in pool[m] for m in seen if m >= 0))
    assert np.mean(told) > 0.6


def shape(out, **changes):
    tok = corpus.tokenizer(out / "data")
    known = dict(vocab_size=tok.n_vocab, header=tuple(tok.header))
    return decoder.Config(**(two_stages.SHAPE | known | changes))


def test_mentions_are_told_apart():
    """Bug: a fact of the same person and relation in another document counts as said before."""
    row = np.zeros((2, two_stages.T), int)
    row[:, 1:13] = [5, 6, 7, 8, 5, 6, 9, 8, 5, 6, 7, 8]
    first, later = two_stages.mentions(row)
    assert first[0].nonzero().flatten().tolist()[:2] == [3, 7]  # column j is token j + 1
    assert later[0, 11] and not first[0, 11]
    assert torch.equal(first[0], first[1])


def test_measure_is_the_loss_of_training(out):
    """Bug: windows after the 64th read the memories of others, whose rows in the pool are off."""
    torch.manual_seed(3)
    model = decoder.Memory3(shape(out))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)  # initial weights attend almost evenly
    cfg = train.TrainConfig(data=f"{out}/data", val="val", context=two_stages.T, batch=70)
    got = two_stages.measure(model.eval(), cfg, dict(arm="plain"))
    cfg.stage = "explicit"
    batch = train.Windows(cfg, "val", model.config).batch(range(70))
    with torch.no_grad():
        want = train.loss_on(model, batch, torch.device("cpu")).item()
        plain = train.loss_on(model, (*batch[:2], None, None), torch.device("cpu")).item()
    assert got["memories"][0] == pytest.approx(want, abs=2e-4)
    assert got["plain"][0] == pytest.approx(plain, abs=2e-4)
    assert abs(want - plain) > 1e-3  # or the test could not tell them apart


def test_other_choices_of_tokens():
    """Bug: "random" picks the same for all, or padding; "first" picks the last."""
    k = torch.zeros(1, 3, 33, 7)
    mask = torch.arange(33)[None] < 29
    assert two_stages.first_tokens(k, k, mask, 5)[0, 2].tolist() == [0, 1, 2, 3, 4]
    picks = torch.cat([two_stages.random_tokens(k, k, mask, 5) for _ in range(40)])
    assert picks.shape == (40, 3, 5) and picks.min() == 0 and picks.max() == 28
    assert not torch.equal(picks[0], picks[1]) and not torch.equal(picks[0, 0], picks[0, 1])


def test_every_run_in_miniature_is_skipped_when_done(tmp_path, monkeypatch):
    """Bug: an arm that does not run; one that starts anew; one that leaves its tokens' choice."""
    two_stages.prepare(tmp_path / "data", 24, 4, 300, 100)
    seen = []
    main = train.main

    def spy(cfg, config):
        kept = decoder.Memory3(config).write(torch.arange(3, 25)[None], return_indices=True)[1]
        seen.append((kept[0, 0, 0].tolist(), config))
        return main(cfg, config)

    monkeypatch.setattr(train, "main", spy)
    results = {}
    for wave in two_stages.plan(quick=True):
        for name, run in wave.items():
            results[name] = two_stages.do(run, name, tmp_path, "cpu", quick=True)
    assert decoder.keep_tokens is memory.keep_tokens
    assert [i for i, (kept, _) in enumerate(seen) if kept == list(range(8))] == [len(seen) - 1]
    changed = [c.memory_tokens for _, c in seen], [c.n_memory_layer for _, c in seen]
    assert {1, 2, 4, 8, 16} == set(changed[0]) and {1, 2, 4} == set(changed[1])
    tokens = {r["arm"]: r["tokens"] for r in results.values()}
    assert tokens["plain"] == tokens["explicit"]
    assert tokens["plain then plain"] == tokens["plain then explicit"]
    assert tokens["plain then plain"] == tokens["explicit then explicit"]

    monkeypatch.setattr(train, "main", None)  # whoever trains now fails
    again = two_stages.do(run, name, tmp_path, "cpu", quick=True)
    assert again == json.loads(json.dumps(results[name]))
    with pytest.raises(ValueError, match="of other settings"):
        two_stages.do(run | dict(steps=7), name, tmp_path, "cpu", quick=True)
    two_stages.save(results, tmp_path / "r.json")
    table = two_stages.tables(json.loads((tmp_path / "r.json").read_text()))
    for run in results.values():
        assert f"| {run['arm']} | " in table
    assert "| quantized memories, not trained with | " in table
    pytest.importorskip("matplotlib")
    two_stages.draw(results, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes()[1:4] == b"PNG"


def test_table_takes_differences_seed_by_seed(tmp_path, capsys):
    """Bug: the difference of means, whose spread is that of the seeds and not of the choice."""

    def run(arm, seed, plain, memories, stage="implicit"):
        final = {"plain": [plain] * 3, "nothing recalled": [plain] * 3, "memories": [memories] * 3}
        final["memories, shift 1"] = [memories] * 3
        return dict(arm=arm, seed=seed, stage=stage, final=final)

    results = {f"plain-{s}": run("plain", s, 1.0 + s, 9.0) for s in (1, 2)}
    results |= {f"e-{s}": run("explicit", s, 8.0, 0.75 + s, "explicit") for s in (1, 2)}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(results))
    two_stages.main(["--table", "--json", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| plain | 2.50 [2.00, 3.00] | 9.00")
    assert lines[3].endswith("| -0.250 [-0.250, -0.250] |")
    with pytest.raises(UserError, match="run this without --table"):
        two_stages.main(["--table", "--json", str(tmp_path / "none.json")])
