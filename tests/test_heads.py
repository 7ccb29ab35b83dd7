"""experiments/heads.py: whose memories are hidden, who is chosen by what, and who is judged."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_eval import questions
from world import World

import corpus
from eval import Asker
from experiments import heads


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    tok = corpus.tokenizer(ROOT / "data/cities")
    w = World(tmp_path_factory.mktemp("heads") / "world", tok)
    lines = [json.dumps(row) + "\n" for row in questions()]
    (w.data / "questions.jsonl").write_text("".join(lines))
    return w


def test_a_head_that_sees_only_what_is_near(build):
    """A window that is one token off, or without the BOS; a mask on every head, or another's."""
    model = build()
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 90, (2, 19), generator=g)
    with torch.no_grad():
        plain = model(tokens)[0]
        for window, same in ((19, 19), (30, 19), (6, 7), (1, 2)):
            near = heads.near_forward(model, tokens, 1, 1, window)
            differs = (near - plain).abs().amax((0, 2)) > 1e-9
            # up to `window` tokens and the BOS nothing is hidden
            assert differs.tolist() == [False] * same + [True] * (19 - same)
        other = heads.near_forward(model, tokens, 1, 0, 6)
        assert (other - heads.near_forward(model, tokens, 1, 1, 6)).abs().max() > 1e-6


def test_scores_are_those_of_the_asker(world):
    """Exactness and nats of another question, of the padding, or of the prompt."""
    retriever, bank = world.open()
    asker = Asker(world.model, world.tok, bank.references, retriever, bank)
    rows = list(questions())[:9]
    h = heads.Heads(asker, rows)
    assert len(h.all) == 4 and len({len(row["question"]) for row in rows}) == 2
    exact, nats = h.ask(h.all)
    for row, e, n in zip(rows, exact, nats, strict=True):
        prompt = asker.prompt(row, "recalled")
        if len(prompt) + 12 < 16:  # one chunk: eval.py recalls nothing new on the way
            (want,) = asker.ask([row], "recalled")
            assert (bool(e), n) == (want["exact"], pytest.approx(want["nats"], abs=1e-3))
        p = 0.0
        ids = retriever.search([prompt[-16:]], 3)[0]
        for sentence in row["sentences"]:
            tokens = torch.tensor([[*prompt, *world.tok.encode(sentence)]])
            table = torch.arange(3).expand(1, -(-tokens.shape[1] // 16), -1)
            pool = bank.recall(ids[0])
            with torch.no_grad():
                logits = world.model(tokens, memories=pool, recall=table)[0][0]
            logp = logits.log_softmax(-1)[range(tokens.shape[1] - 1), tokens[0, 1:]]
            p += float(logp[len(prompt) - 1 :].sum().exp())
        assert n == pytest.approx(-np.log(p), abs=1e-3)
    assert world.model.config.memory_heads == "all"
    spoilt = heads.Heads(asker, rows)  # what a head without memories does not see changes nothing
    for batch in spoilt.parts:
        batch.pool.kv[:, 1, :, 0] = 7.0
    some = [(0, 0), (0, 1), (1, 1)]
    assert np.array_equal(spoilt.ask(some)[1], h.ask(some)[1])
    assert np.abs(spoilt.ask(h.all)[1] - nats).max() > 1e-3
    none = asker.ask(rows, "none")
    assert h.ask([])[1].tolist() == pytest.approx([x["nats"] for x in none], abs=1e-3)


def test_heads_are_chosen_on_one_half_and_judged_on_the_other():
    """The heads that suit the questions they are judged by; a fact in both halves."""

    class Told:
        all = ["a", "b", "c"]

        def ask(self, chosen):  # c helps all a little, a helps some much
            return None, np.array([9.0 - 5 * ("a" in chosen), 9.0]) - ("c" in chosen)

    assert heads.best_first(Told(), 2) == ["a", "c"]
    assert heads.best_first(Told(), 3) == ["a", "c", "b"]
    rows = [dict(fact=i // 2, question=i) for i in range(11)]
    first, second = heads.halves(rows, seed=3)
    assert len(first) in (5, 6) and {r["question"] for r in first + second} == {*range(11)}
    assert not {r["fact"] for r in first} & {r["fact"] for r in second}


def test_main(world, tmp_path, capsys):
    """Bytes of all heads beside a few, a random choice called the best, a row that is not there."""
    flags = dict(checkpoint=world.checkpoint, data=world.data, bank=world.bank, device="cpu")
    flags |= dict(questions=12, random=2, window=5, json=tmp_path / "heads.json")
    argv = [*(str(x) for k, v in flags.items() for x in (f"--{k}", v)), "--shares", "1", "3", "9"]
    result = heads.main(argv)
    assert json.loads((tmp_path / "heads.json").read_text()) == result
    rows = result["choices"]
    assert [row["bytes"] * 4 // rows[0]["bytes"] for row in rows] == [4, *[1] * 4, *[3] * 4, 0]
    assert rows[0]["bytes"] == 2 * 2 * 2 * 2 * 5 * 12
    for row in rows[:-1]:
        assert len(row["heads"].split(",")) == 4 * row["bytes"] // rows[0]["bytes"]
    assert rows[-1]["heads"] == ""
    assert set(result["single"]) == {"0.0", "0.1", "1.0", "1.1"}
    out = capsys.readouterr().out
    assert "12 questions: 6 to choose by, 6 to judge by" in out and "| best 3 |" in out
    best = rows[1]
    assert result["single"][best["heads"]]["nats_alone"] == pytest.approx(best["nats"])
    with pytest.raises(ValueError, match="--shares: there are 4 heads"):
        heads.main([*argv[:-3], "4"])
    with pytest.raises(SystemExit):
        heads.main([*argv, "--examples", "3"])


def test_the_evidence_is_the_measured_one():
    """A table edited by hand, or older than the result beside it."""
    result = json.loads((ROOT / "experiments/results/heads.json").read_text())
    table = heads.tables(result).split("\n\n")[0]
    evidence = (ROOT / "experiments/README.md").read_text()
    assert f"<!-- heads -->\n{table}\n<!-- /heads -->" in evidence
