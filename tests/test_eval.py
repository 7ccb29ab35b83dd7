"""eval.py: what counts as exact, what each condition may see, and the table and file it makes."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sample import PLACES, Bank, Log, World, text_of

import corpus
import eval as evaluation
from bank import MemoryBank
from common import UserError
from eval import CONDITIONS, Asker, load_questions, markdown, measure
from generate import generate, likelihood
from memory import Memories

ROOT = Path(corpus.__file__).parent


def questions():
    """Two relations in turns, answers and questions of several lengths."""
    for i in range(len(PLACES)):
        name = PLACES[i] + "holm"
        n, land = str(1013 * (i + 3)), f"{PLACES[-i - 1]}land"
        people = dict(question=f"What is the population of {name}?", answer=n)
        people |= dict(sentences=[f" has {n} people.", f" has a population of {n}."])
        country = dict(question=f"Which country is {name} in?", answer=land)
        country |= dict(sentences=[f" is in {land}.", f" is a place in {land}."])
        for row, relation in ((people, "population"), (country, "country")):
            assert name + row["sentences"][0] in text_of(i)
            yield dict(row, relation=relation, city=name, reference=i)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    w = World(tmp_path_factory.mktemp("eval") / "world", corpus.tokenizer(ROOT / "data/cities"))
    lines = [json.dumps(row) + "\n" for row in questions()]
    (w.data / "questions.jsonl").write_text("".join(lines))
    w.codes = w.bank.with_name("kb.codes")
    w.open()[1].quantize(str(w.codes))
    return w


@pytest.fixture
def asker(world):
    retriever, bank = world.open()
    codes = MemoryBank.open(str(world.codes), world.model, bank.references)
    return Asker(world.model, world.tok, bank.references, retriever, bank, codes)


# ---------------------------------------------------------------------------------------------
# Exactness and nats


class Numbers:
    """A tokenizer of texts such as "12 5 7", so that any answer can be asked for."""

    bos = 96

    def encode(self, text):
        return [int(t) for t in text.split()]


@pytest.fixture
def numbers(build, references):
    """An Asker on the tiny model of conftest.py, with 19 references in RAM, and 23 questions."""
    model, rows = build(), []
    refs = references([1 + (5 * i) % 13 for i in range(19)], 13)
    with torch.no_grad():
        bank = Bank(model.write(refs))
    g = torch.Generator().manual_seed(8)
    for i in range(23):
        texts = [
            " ".join(map(str, torch.randint(0, 90, (n,), generator=g).tolist()))
            for n in (5 + i % 3, 3, 5 + i % 2, 4)
        ]
        row = dict(question=texts[0], city=texts[1], sentences=texts[2:], relation="abc"[i % 3])
        rows.append(row | dict(reference=i % 19))
    listed = [r[r >= 0].tolist() for r in refs]
    return Asker(model, Numbers(), listed, Log(19), bank, bank), rows


@pytest.mark.parametrize("condition", ["plain", "none", "recalled", "oracle", "rag"])
def test_exact_is_what_greedy_generation_writes(numbers, condition):
    """An answer called exact that the model would never have written, or the other way round; the
    results of one question given to another of its group."""
    asker, rows = numbers
    for i, row in enumerate(rows):  # what the model does write, question by question
        prompt = asker.prompt(row, condition)
        retriever, bank = asker.sources([row], condition)
        how = dict(plain=condition in ("plain", "rag"))  # the format in which it is used to read
        out, _ = generate(asker.model, torch.tensor([prompt]), 5, retriever, bank, **how)
        said = out[0, len(prompt) :].tolist()
        if i % 3 == 1:  # a third of the answers is right, a third wrong in the last token only
            said[-1] = (said[-1] + 1) % 90
        if i % 3:  # in either of the two sentences
            row["sentences"][i % 2] = " ".join(map(str, said))
    asked = asker.ask(rows, condition, batch=4)
    want = []
    for row in rows:
        prompt = asker.prompt(row, condition)
        retriever, bank = asker.sources([row], condition)
        out, _ = generate(asker.model, torch.tensor([prompt]), 6, retriever, bank, **how)
        said = " ".join(map(str, out[0, len(prompt) :].tolist())) + " "
        want.append(any(said.startswith(sentence + " ") for sentence in row["sentences"]))
    assert [a["exact"] for a in asked] == want
    assert sum(want) == 7 and all(want[2::3])
    for row, a in zip(rows, asked, strict=True):  # the prompt's last 7 tokens recall what is read
        ids = Log(19).search([asker.prompt(row, condition)[-7:]], 4)[0][0]
        assert condition != "recalled" or a["found"] == (row["reference"] in ids)
    # nats: those of one question alone, and of the plain sum over its tokens
    for row, a in zip(rows[:5], asked, strict=False):
        alone = asker.ask([row], condition)[0]
        assert alone["nats"] == pytest.approx(a["nats"], abs=1e-4) and a["nats"] > 0
        assert alone["found"] == a["found"]


@pytest.mark.parametrize("condition", ["plain", "none"])
def test_nats_without_memory(numbers, condition):
    """The log-likelihood of prompt and answer, or of all but the first token of the answer; one
    sentence alone where the probabilities of both add up; a plain decoder with a header."""
    asker, rows = numbers
    pool = Memories.empty(asker.model.config) if condition == "none" else None
    for row, a in zip(rows, asker.ask(rows, condition), strict=True):
        p = 0
        for sentence in row["sentences"]:
            tokens = asker.tok.encode(f"96 {row['question']} {row['city']} {sentence}")
            n = len(asker.tok.encode(sentence))
            assert n in (4, 5, 6)
            targets = torch.tensor([[-1] * (len(tokens) - n) + tokens[-n:]])[:, 1:]
            with torch.no_grad():
                loss = asker.model(torch.tensor([tokens])[:, :-1], targets, memories=pool)[1]
            p += math.exp(-float(loss) * n)
        assert a["nats"] == pytest.approx(-math.log(p), abs=1e-3)
        assert not a["found"]


def test_the_given_reference_is_given(numbers):
    """Every question of a batch given the reference of the first."""
    asker, rows = numbers
    full = []
    for row in rows:
        row["sentences"] = row["sentences"][:1]
        prompt, answer = asker.prompt(row, "oracle"), asker.tok.encode(row["sentences"][0])
        tokens = torch.tensor([prompt + answer])
        table = torch.full((1, -(-tokens.shape[1] // 7), 4), -1)
        table[..., 2] = row["reference"]  # any slot
        with torch.no_grad():
            logits = asker.model(tokens, memories=asker.bank.memories, recall=table)[0]
        p = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        full.append(-float(p[range(len(answer)), answer].sum()))
    asked = asker.ask(rows, "oracle", batch=8)
    assert [a["nats"] for a in asked] == pytest.approx(full, abs=1e-3)
    assert all(a["found"] for a in asked)


def test_rag_leaves_out_the_worst_where_not_all_fit(numbers, monkeypatch):
    """A large --n_recall that ends the whole evaluation at its last condition; the best left out
    instead of the worst; no room for the answer."""
    asker, rows = numbers
    whole = asker.prompt(rows[0], "rag")
    question = asker.prompt(rows[0], "none")[1:]
    ids = asker.retriever.search([[96, *question][-7:]], asker.R)[0][0]
    texts = [asker.references[int(i)] for i in ids]
    assert whole[1:] == sum(texts, []) + question and len(texts) > 2
    monkeypatch.setattr(asker.model.config, "max_context", evaluation.ANSWER + len(whole) - 2)
    assert asker.prompt(rows[0], "rag")[1:] == sum(texts[:-1], []) + question


def test_rag_puts_the_same_references_into_the_context(asker, world):
    """Text of other references than those recalled, or after the question."""
    row = list(questions())[9]
    prompt = asker.prompt(row, "rag")
    bare = torch.tensor([asker.prompt(row, "recalled")])
    recalled = generate(world.model, bare, 1, *world.open())[1].recalls[-1]["ids"][0]
    assert recalled[0] == row["reference"]
    text = " ".join(text_of(i) for i in recalled) + f" {row['question']} {row['city']}"
    assert prompt == [world.tok.bos, *world.tok.encode(text)]
    assert asker.sources([row], "rag") == (None, None) == asker.sources([row], "none")


class Poisoned(Bank):
    """The same bank with every memory spoilt."""

    def recall(self, ids):
        memories = self.memories.recall(ids)
        return Memories(torch.full_like(memories.kv, 7.0), memories.count)


def test_no_memory_means_no_memory(asker):
    """A "no memory" that reads memories: whatever stands in the bank must not move it."""
    rows = list(questions())[:8]
    clean = {c: [a["nats"] for a in asker.ask(rows, c)] for c in CONDITIONS}
    asker.bank, asker.codes = Poisoned(asker.bank), Poisoned(asker.codes)
    spoilt = {c: [a["nats"] for a in asker.ask(rows, c)] for c in CONDITIONS}
    for condition in CONDITIONS:
        change = np.abs(np.array(clean[condition]) - spoilt[condition]).max()
        if condition in ("plain", "none", "rag"):
            assert change == 0, condition
        else:  # and the others do read it
            assert change > 1e-2, condition


# ---------------------------------------------------------------------------------------------
# The table

KEYS = {"exact", "nats", "separable", "bytes_per_reference", "ms_per_token"}


def test_measure(asker, world):
    """A condition or relation left out; a share of something else than the questions asked."""
    rows = list(questions())
    table = measure(asker, rows, timed=2)
    assert list(table) == ["plain", "none", "random", "recalled", "quantized", "oracle", "rag"]
    for condition, row in table.items():
        assert set(row) == {"found", *KEYS}
        assert list(row["exact"]) == ["all", "population", "country"]
        numbers = [*row["exact"].values(), *(v for k, v in row.items() if k != "exact")]
        assert all(math.isfinite(x) for x in numbers), condition
        assert row["nats"] > 0 and row["ms_per_token"] > 0 and 0 <= row["exact"]["all"] <= 1
    assert len({row["nats"] for row in table.values()}) == 7
    found = {condition: row["found"] for condition, row in table.items()}
    assert found["oracle"] == 1 and found["plain"] == found["none"] == found["rag"] == 0
    assert found["recalled"] == found["quantized"] > 0.9 > 0.5 > found["random"]
    size = {condition: row["bytes_per_reference"] for condition, row in table.items()}
    assert size["random"] == size["recalled"] == size["oracle"] == 2 * 2 * 2 * 2 * 5 * 12
    assert size["plain"] == size["none"] == 0 and 0 < size["quantized"] < size["recalled"] / 2
    texts = [len(f" {text_of(i)}".encode()) for i in range(len(PLACES)) for _ in range(2)]
    assert size["rag"] == pytest.approx(np.mean(texts))


def test_measure_counts(asker):
    """Exactness of one relation put into the row of another."""
    rows = list(questions())
    asker.ask = lambda rows, condition: [
        dict(exact=r["relation"] == "country" and r["reference"] < 5, nats=float(i), found=i < 17)
        for i, r in enumerate(rows)
    ]
    asker.ms_per_token = lambda rows, condition: float(len(rows))
    (row,) = measure(asker, rows, ["recalled"], timed=3).values()
    assert row["exact"] == pytest.approx({"all": 5 / 34, "population": 0, "country": 5 / 17})
    assert (row["nats"], row["found"], row["ms_per_token"]) == (16.5, 0.5, 3)


def test_separable_is_definition_2_6(asker):
    """A fact called separable that the model knew without memory, or that memory made only
    likely; the two conditions exchanged. Here: p without, p with, and whether it counts."""
    cases = [(0.499, 0.901, 1), (0.51, 1.0, 0), (0.01, 0.89, 0), (0.01, 0.91, 1), (0.95, 0.01, 0)]
    rows = list(questions())[: len(cases)]
    asker.ask = lambda rows, condition: [
        dict(exact=True, found=True, nats=-math.log(case[condition == "oracle"])) for case in cases
    ]
    asker.ms_per_token = lambda rows, condition: 1.0
    table = measure(asker, rows, ["oracle", "random"])
    assert table["oracle"]["separable"] == 2 / 5 and table["random"]["separable"] == 0
    assert list(table) == ["oracle", "random"]


@pytest.mark.parametrize("kind", ["plain", "empty", "recall"])
def test_likelihood_is_the_full_forward_of_each_pair(numbers, kind):
    """Padding that is looked at, the answer shifted by one, the memories of another pair."""
    asker, _ = numbers
    g = torch.Generator().manual_seed(2)
    some = [torch.randint(0, 90, (n,), generator=g).tolist() for n in (9, 3, 17, 5, 1, 8)]
    pairs = list(zip(some[::2], some[1::2], strict=True))
    pool = dict(plain=None, empty=Memories.empty(asker.model.config)).get(kind, asker.bank.memories)
    recall = torch.tensor([[3, -1], [5, 0], [-1, -1]]) if kind == "recall" else None
    for i, (logp, greedy) in enumerate(likelihood(asker.model, pairs, pool, recall)):
        before, after = pairs[i]
        tokens = torch.tensor([before + after])
        table = None
        if recall is not None:
            table = recall[i].expand(1, -(-tokens.shape[1] // 7), -1)
        logits = asker.model(tokens, memories=pool, recall=table)[0][0, len(before) - 1 : -1]
        full = logits.log_softmax(-1)[range(len(after)), after].sum()
        assert logp == pytest.approx(full.item(), abs=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == after)
        best = [(before, [int(logits[0].argmax())])]  # and one that is the likeliest
        one = None if recall is None else recall[i : i + 1]
        assert likelihood(asker.model, best, pool, one)[0][1]


def test_markdown():
    """A column under another column's name."""
    row = dict(
        exact={"all": 0.5, "country": 0.25, "population": 0.75},
        nats=1.234,
        bytes_per_reference=12345.6,
        ms_per_token=7.89,
    )
    lines = markdown(dict(a=row, b=dict(row, nats=12)), dict(a="with", b="without")).split("\n")
    assert lines == [
        "| condition | all | country | population | nats per answer | bytes per reference "
        "| ms per token |",
        "|---|--:|--:|--:|--:|--:|--:|",
        "| with | 0.500 | 0.250 | 0.750 | 1.23 | 12,346 | 7.9 |",
        "| without | 0.500 | 0.250 | 0.750 | 12.00 | 12,346 | 7.9 |",
    ]


def test_load_questions(tmp_path):
    """A traceback of the JSON reader, or of a question without a city; all of the questions where
    a few were asked for."""
    path = tmp_path / "questions.jsonl"
    with pytest.raises(UserError, match="questions.jsonl is missing: run python .*prepare"):
        load_questions(path, 3)
    path.write_text("")
    with pytest.raises(ValueError, match="questions.jsonl holds no question"):
        load_questions(path, 3)
    rows = list(questions())
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    assert load_questions(path, 5) == rows[:5] and load_questions(path, 600) == rows
    path.write_text("\n" + text + "\n")
    assert load_questions(path, 600) == rows
    path.write_text(json.dumps({k: v for k, v in rows[0].items() if k != "city"}) + "\n5\n")
    with pytest.raises(ValueError, match="questions.jsonl is damaged: KeyError.'city'"):
        load_questions(path, 600)
    path.write_text(text[:-9])
    assert load_questions(path, 5) == rows[:5]
    with pytest.raises(ValueError, match="questions.jsonl is damaged") as e:
        load_questions(path, 600)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------
# The command line


def args(world, *more, **changes):
    flags = dict(checkpoint=world.checkpoint, data=world.data, bank=world.bank, device="cpu")
    flags |= dict(codes=world.codes, questions=6, examples=1) | changes
    return [*(str(x) for k, v in flags.items() for x in (f"--{k}", v)), *more]


def test_main(world, tmp_path, capsys):
    """A key that checks rely on and that is not there, or is called otherwise."""
    path = tmp_path / "new/demo.json"
    result = evaluation.main(args(world, "--json", str(path)))
    assert json.loads(path.read_text()) == result
    assert set(result) == {"conditions", "recall_at_5", "questions", "references", "seconds"}
    assert set(result["conditions"]) == set(CONDITIONS)
    for row in result["conditions"].values():
        assert set(row) == KEYS
        assert set(row["exact"]) == {"all", "population", "country"}
    assert (result["questions"], result["references"]) == (6, 17) and result["seconds"] > 0
    assert result["recall_at_5"] == 1
    out = capsys.readouterr().out
    assert "| no memory (header, empty pool) |" in out
    assert "| recalled: hash:512, top 3 |" in out and "(RAG: the same 3 references)" in out
    assert out.count("| ") > 7 * 7 and "among the top 3 for 1.000 of the questions" in out
    assert "What is the population of Abaholm?" in out and "(truth: 3039)" in out
    assert "recalled by" in out and "What is the population of Belholm?\n" not in out


def test_main_with_a_smaller_r(world, capsys):
    """--n_recall that makes the model a stranger to its own bank, or is not heard."""
    result = evaluation.main(args(world, n_recall=2, examples=0))
    out = capsys.readouterr().out
    assert "top 2" in out and "top 3" not in out and set(result["conditions"]) == set(CONDITIONS)


def test_bad_input_is_one_line(world, tmp_path, monkeypatch):
    """A traceback, or the memories of another model asked in silence."""
    world.save(tmp_path / "other.pt", seed=2)
    world.save(tmp_path / "foreign.pt", seed=1, tokenizer="gpt2:12345678")
    monkeypatch.chdir(tmp_path)
    for changes, line in [
        (dict(checkpoint="nowhere.pt"), "nowhere.pt: no checkpoint there"),
        (dict(checkpoint="other.pt"), "kb.bank"),
        (dict(checkpoint="foreign.pt"), "trained with tokenizer gpt2:12345678"),
        (dict(codes="nowhere.codes"), "nowhere.codes"),
        (dict(data=tmp_path / "nodata"), "nodata/meta.json is missing"),
        (dict(references="nokb"), "nokb.bin is missing"),
        (dict(n_recall=18), "k = 18 of N = 17"),
        (dict(questions=0), "--questions is at least 1"),
        (dict(windows=0), "so is --windows"),
        (dict(checkpoint="nowhere.pt", json=tmp_path), "is a directory"),  # before the work
        (dict(codes=world.bank), "is not quantized"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=line) as e:
            evaluation.main(args(world, **changes))
        assert "\n" not in str(e.value), line
    monkeypatch.setattr(sys, "argv", ["eval.py", *args(world, checkpoint="nowhere.pt")])
    with pytest.raises(SystemExit, match="^eval.py: nowhere.pt: no checkpoint there"):
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    with pytest.raises(SystemExit) as e:
        evaluation.main(["--question", "3"])
    assert e.value.code == 2
