"""eval.py: what counts as exact, what each condition may see, and the table and file it makes."""

import doctest
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from world import PLACES, Bank, Log, World, text_of

import corpus
import eval as evaluation
from bank import MemoryBank
from eval import (
    CONDITIONS,
    Asker,
    check_lengths,
    cloze,
    load_questions,
    markdown,
    measure,
    new_words,
    stands_in,
)
from generate import generate, likelihood
from memory import Memories

ROOT = Path(corpus.__file__).parent


def questions():
    """Two relations in turns, answers and questions of several lengths."""
    for i in range(len(PLACES)):
        name = PLACES[i] + "holm"
        n = str(1013 * (i + 3))
        land = f"{PLACES[-i - 1]}land"
        people = dict(question=f"What is the population of {name}?", answer=n)
        people |= dict(sentences=[f" has {n} people.", f" has a population of {n}."])
        country = dict(question=f"Which country is {name} in?", answer=land)
        country |= dict(sentences=[f" is in {land}.", f" is a place in {land}."])
        for row, relation in ((people, "population"), (country, "country")):
            assert name + row["sentences"][0] in text_of(i)
            fact = 2 * i + (relation == "country")
            row = dict(row, relation=relation, city=name, reference=i, fact=fact)
            yield dict(row, questions=[row["question"]])


@pytest.fixture(scope="module")
def tok():
    return corpus.tokenizer(ROOT / "data/cities")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tok):
    w = World(tmp_path_factory.mktemp("eval") / "world", tok)
    lines = [json.dumps(row) + "\n" for row in questions()]
    (w.data / "questions.jsonl").write_text("".join(lines))
    w.open()[1].quantize(progress=False)
    return w


@pytest.fixture
def asker(world):
    retriever, bank = world.open()
    codes = MemoryBank.open(world.bank, world.model, codes=True)
    return Asker(world.model, world.tok, bank.references, retriever, bank, codes)


# ---------------------------------------------------------------------------------------------
# Exactness and nats


class Numbers:
    """A tokenizer of texts such as "12 5 7", so that any answer can be asked for."""

    bos = 96

    def encode(self, text):
        return [int(t) for t in text.split()]


class Listed(list):
    """References in RAM."""

    def live(self):
        return np.arange(len(self))


@pytest.fixture
def numbers(build, references):
    """An Asker on the tiny model of conftest.py, with 19 references in RAM, and 23 questions."""
    model = build()
    rows = []
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
        rows.append(row | dict(reference=i % 19, fact=i, questions=texts[:1], answer="1"))
    listed = Listed(r[r >= 0].tolist() for r in refs)
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
            tokens = asker.tokenizer.encode(f"96 {row['question']} {row['city']} {sentence}")
            n = len(asker.tokenizer.encode(sentence))
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
        prompt = asker.prompt(row, "oracle")
        answer = asker.tokenizer.encode(row["sentences"][0])
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
    ids = asker.retriever.search([[96, *question][-7:]], asker.model.config.n_recall)[0][0]
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
    a few were asked for; a line that is wrong and is not named."""
    path = tmp_path / "questions.jsonl"
    for empty in ("", "\n", "\ufeff\n"):
        path.write_text(empty, encoding="utf-8")
        with pytest.raises(ValueError, match="questions.jsonl is empty"):
            load_questions(path, 3)
    rows = list(questions())
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for more in (text, "\n" + text + "\n", "\ufeff" + text + "\r\n \n"):
        path.write_text(more, encoding="utf-8")
        assert load_questions(path, 5) == rows[:5] and load_questions(path, 600) == rows
    path.write_text(text[:-9])
    with pytest.raises(ValueError, match="questions.jsonl is damaged: line 34: ") as e:
        load_questions(path, 600)
    assert "\n" not in str(e.value)
    good = dict(question="q?", answer="a")
    for wrong, words in [
        (5, "it holds an integer"),
        (dict(question="q?"), "it has no 'answer'"),
        (dict(good, question=" "), "question is empty"),
        (dict(good, answer=7), "'answer' is an integer"),
        (dict(good, sentences="a."), "sentences must be a list of texts"),
        (dict(good, questions=["q?", ""]), "questions must be a list of texts"),
        (dict(good, city=None), "city must be a text"),
        (dict(good, relation=3), "relation must be a text"),
        (dict(good, reference="7"), "reference must be the row"),
        (dict(good, reference=True), "reference must be the row"),
        (dict(good, reference=-2), "reference must be the row"),
    ]:
        path.write_text(f"{json.dumps(good)}\n\n{json.dumps(wrong)}\n")
        with pytest.raises(ValueError, match=f"questions.jsonl.* line 3: {words}"):
            load_questions(path, 600)
    with pytest.raises(ValueError, match="nowhere.jsonl is missing"):
        load_questions(tmp_path / "nowhere.jsonl", 3)


def test_a_question_and_its_answer_are_enough(tmp_path):
    """Keys that only the toy's questions have, asked of everybody's; a wording asked twice."""
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "Who?", "answer": "Ada", "questions": ["Who?", "Who is it?"]}\n')
    (row,) = load_questions(path, 9)
    assert row == dict(
        question="Who?",
        answer="Ada",
        questions=["Who?", "Who is it?"],
        sentences=[],
        city="",
        relation="",
        reference=-1,
        fact=0,
    )
    path.write_text('{"question": "Who?", "answer": "Ada", "sentences": []}\n')
    assert load_questions(path, 9)[0]["sentences"] == []
    row = dict(question="Who?", answer="Ada", sentences=[" Ada", " Ada Byron", " Ada"])
    path.write_text(json.dumps(row) + "\n")  # else its probability counts twice
    assert load_questions(path, 9)[0]["sentences"] == [" Ada", " Ada Byron"]


def test_a_fact_is_asked_in_all_its_wordings(asker):
    """Definition 2.6 asked of one wording: a fact called separable that another wording fails."""
    p = {"Q0 one": (0.1, 0.95), "Q0 two": (0.1, 0.5), "Q1": (0.1, 0.95), "Q2": (0.6, 0.95)}
    rows = [dict(fact=i, relation="", reference=i, sentences=["x"]) for i in range(3)]
    for row, wordings in zip(rows, (["Q0 one", "Q0 two"], ["Q1"], ["Q2"]), strict=True):
        row |= dict(question=wordings[0], questions=wordings)
    asked = []

    def ask(rows, condition):
        asked.append([row["question"] for row in rows])
        at = int(condition == "oracle")
        return [dict(exact=True, found=True, nats=-math.log(p[q][at])) for q in asked[-1]]

    asker.ask = ask
    asker.ms_per_token = lambda rows, condition: 1.0
    row = measure(asker, rows, ["oracle"])["oracle"]
    assert asked == [list(p)] * 2 and row["separable"] == pytest.approx(1 / 3)
    assert row["nats"] == pytest.approx(-np.mean(np.log([q[1] for q in p.values()])))


def test_an_answer_that_is_free_to_start(numbers):
    """An answer that must be the first words; 42 found in 4242; the second sentence searched."""
    asker, rows = numbers
    for row in rows:
        row["sentences"] = []

    class Words(Numbers):  # the model's own words are text
        def decode(self, ids):
            return " " + " ".join(map(str, ids.tolist()))

    asker.tokenizer = Words()
    for i, row in enumerate(rows):
        prompt = torch.tensor([asker.prompt(row, "none")])
        said = generate(asker.model, prompt, 32)[0][0, prompt.shape[1] :].tolist()
        absent = next(t for t in range(90) if t not in said)
        row["answer"] = str(said[i % 9] if i % 2 else absent)
    results = asker.ask(rows, "none", batch=4)
    assert [r["exact"] for r in results] == [i % 2 == 1 for i in range(23)]
    assert all(math.isfinite(r["nats"]) for r in results)
    for answer, said, yes in [
        ("42", " 4242 people", False),
        ("42", " It has 42, they say.", True),
        ("Ada", " Adamant", False),
        ("ADA", " it was ada!", True),
        ("7", " None. There are 7.", False),
        ("3.5", " It is 3.5 m.", True),
        ("(x)", " f(x) = 3", True),
        ("東京", "答えは東京都です。", True),
        ("", "x", False),
    ]:
        if answer:
            assert stands_in(answer, said) == yes, answer


def test_free_answers_without_room(numbers):
    """A question so long that no 32 tokens are left, a row without a known reference."""
    asker, rows = numbers
    row = dict(rows[0], question=" ".join(["5"] * 80), city="", sentences=[], reference=-1)
    asker.tokenizer.decode = lambda ids: " ".join(map(str, ids.tolist()))
    for condition in ("plain", "none", "random", "recalled", "rag"):
        (result,) = asker.ask([row], condition)
        assert not result["found"] and math.isfinite(result["nats"])
    assert asker.prompt(row, "rag") == asker.prompt(row, "none")  # 81 of 90: no text fits
    check_lengths(asker, [dict(row, questions=[row["question"]])])
    with pytest.raises(ValueError, match="are more than max_context = 90"):
        check_lengths(asker, [dict(row, questions=[" ".join(["5"] * 89)])])


def test_cloze_items():
    """An item about what training has read, cut before its first number, or asked of nothing; "10"
    that is right for who says 1010; a part of a word, or any word of every day, to be guessed."""
    texts = [
        "Oulu has 20 people. Oulu lies in the north of Finland, at 65 degrees.",
        "Nothing new is here. At all.",
        "1234 is what it begins with.",
        "In 1913 the mayor was Zebulon Quux of Oulu.",
        "東京の人口は4242人です。つぎ",
        "It was in the 1990s that COVID-77 and x_88 came to people.",
        "What stands at the very end is 99",
        "A list of Hamlets\nmore",
        "दिल्ली में 57 लोग रहते हैं। और वहाँ",
        "It cost them $33, they said.",
    ]
    texts = dict(enumerate(texts))
    new = set("20 65 1913 1234 quux zebulon 4242 1990 s 77 88 99 people hamlets 57 33".split())
    rows = {row["reference"]: row for row in cloze(texts, new, 9)}
    assert {i: row["sentences"] for i, row in rows.items()} == {
        0: [" 20 people"],
        3: [" Quux of"],
        4: ["4242人"],
        7: [" Hamlets\n"],
        8: [" 57 लोग"],
        9: ["33,"],
    }
    assert rows[0]["question"] == "Oulu has" and rows[9]["question"] == "It cost them $"
    assert rows[3]["question"] == "In 1913 the mayor was Zebulon" and rows[3]["answer"] == "Quux"
    assert rows[4]["question"] == "東京の人口は"
    assert (rows[0]["relation"], rows[3]["relation"]) == ("number", "word")
    assert sorted(row["fact"] for row in rows.values()) == [0, 1, 2, 3, 4, 5]
    assert len(cloze(texts, new, 2)) == 2 and cloze(texts, set(), 9) == []


def test_new_words_are_in_no_training_text(world, tok, capsys):
    """A word counted as new that stands where one block of the text ends and the next begins."""
    texts = [text_of(i) for i in range(17)]
    rare = new_words(texts, tok, world.data)
    every = {word.casefold() for text in texts for word in text.replace(".", " ").split()}
    assert rare == every - {"people", "has", "is", "in"} and {"abaholm", "3039"} <= rare
    assert "has no training text here" in capsys.readouterr().out
    said = tok.encode("Other words. ") * 30_000 + tok.encode("The people of Abaholm: 3039,") * 9_000
    assert len(said) > 1 << 18
    corpus.write_tokens(world.data / "explicit.bin", said, tok.n_vocab)
    left = new_words(texts, tok, world.data, progress=False)
    (world.data / "explicit.bin").unlink()
    assert every - left == {"abaholm", "3039", "people"}
    assert "has no training text here" not in capsys.readouterr().out


def test_items_are_made_from_what_is_held_out(world, tok, monkeypatch):
    """An item about a reference that is training text, too; the same items in another order."""
    references = world.open()[1].references
    a = evaluation.parser().parse_args(["--data", str(world.data), "--questions", "6"])
    rows = evaluation.make_rows(a, references, tok)
    assert len(rows) == 6 and rows == evaluation.make_rows(a, references, tok)
    for row in rows:
        text = text_of(row["reference"])
        assert f"{row['question']}{row['sentences'][0]}" in text
    manifest = corpus.manifest(world.data)
    monkeypatch.setattr(corpus, "manifest", lambda data: dict(manifest, heldout=5))
    a.questions = 9
    rows = evaluation.make_rows(a, references, tok)
    assert sorted(row["reference"] for row in rows) == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------
# The command line


def args(world, *more, **changes):
    flags = dict(checkpoint=world.checkpoint, data=world.data, bank=world.bank, device="cpu")
    flags |= dict(questions=6, examples=1) | changes
    return [*(str(x) for k, v in flags.items() for x in (f"--{k}", v)), *more]


def test_main(world, tmp_path, capsys):
    """A key that checks rely on and that is not there, or is called otherwise."""
    path = tmp_path / "new/demo.json"
    result = evaluation.main(args(world, "--json", str(path)))
    assert json.loads(path.read_text()) == result
    keys = {"conditions", "hit_rate", "questions", "wordings", "references", "seconds"}
    assert set(result) == keys
    assert set(result["conditions"]) == set(CONDITIONS)
    for row in result["conditions"].values():
        assert set(row) == KEYS
        assert set(row["exact"]) == {"all", "population", "country"}
    assert (result["questions"], result["references"]) == (6, 17) and result["seconds"] > 0
    assert result["hit_rate"] == 1 and result["wordings"] == 6
    out = capsys.readouterr().out
    assert "| no memory (header, empty pool) |" in out
    assert "| recalled: hash:512, top 3 |" in out and "(RAG: the same 3 references)" in out
    assert out.count("| ") > 7 * 7 and "among the top 3 for 1.000 of the wordings" in out
    assert "What is the population of Abaholm?" in out and "(truth: 3039)" in out
    assert "recalled by" in out and "What is the population of Belholm?\n" not in out


def test_main_with_a_smaller_r(world, capsys):
    """--n_recall that makes the model a stranger to its own bank, or is not heard."""
    result = evaluation.main(args(world, n_recall=2, examples=0))
    out = capsys.readouterr().out
    assert "top 2" in out and "top 3" not in out and set(result["conditions"]) == set(CONDITIONS)


def test_main_with_memories_for_some_heads(world, capsys):
    """A row at the bytes of all heads, or that changes the rows after it; a head that is not."""
    result = evaluation.main(args(world, examples=0, memory_heads="1.1,0.0,1.1"))
    out = capsys.readouterr().out
    assert "| recalled, memories of 2 of 4 heads |" in out
    rows = result["conditions"]
    assert list(rows)[3:6] == ["recalled", "heads", "quantized"]
    assert rows["heads"]["bytes_per_reference"] == rows["recalled"]["bytes_per_reference"] / 2
    assert rows["heads"]["nats"] != pytest.approx(rows["recalled"]["nats"], abs=1e-3)
    plain = evaluation.main(args(world, examples=0))["conditions"]
    for condition, row in plain.items():
        assert rows[condition]["nats"] == pytest.approx(row["nats"], abs=1e-5)
    every = evaluation.main(args(world, examples=0, memory_heads="0.0,0.1,1.0,1.1"))["conditions"]
    assert every["heads"]["nats"] == pytest.approx(every["recalled"]["nats"], abs=1e-5)
    for wrong in ("2.0", "0.2", "x", "1"):
        with pytest.raises(ValueError, match="memory_heads"):
            evaluation.main(args(world, memory_heads=wrong))


def test_main_without_questions(world, tmp_path, capsys):
    """A data set without questions that nobody can evaluate; rows without references whose hit
    rate is 0; codes that were not made and end it all."""
    path = tmp_path / "free.jsonl"
    lines = [dict(question=row["question"], answer=row["answer"]) for row in questions()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = args(world, examples=0, questions_file=path)
    (world.bank / "codes").rename(tmp_path / "codes")
    try:
        result = evaluation.main(flags)
    finally:
        (tmp_path / "codes").rename(world.bank / "codes")
    out = capsys.readouterr().out
    assert "the right reference: left out" in out and "hit rate:" not in out
    assert f"--out {world.bank} --quantize" in out
    assert result["hit_rate"] is None and set(result["conditions"]["rag"]["exact"]) == {"all"}
    assert set(result["conditions"]) == set(CONDITIONS) - {"oracle", "quantized"}
    (world.data / "questions.jsonl").rename(tmp_path / "hidden")
    try:
        result = evaluation.main(args(world, examples=1))
        out = capsys.readouterr().out
    finally:
        (tmp_path / "hidden").rename(world.data / "questions.jsonl")
    assert "the items are sentences of references, cut off" in out and "(truth: " in out
    assert set(result["conditions"]) == set(CONDITIONS) and result["hit_rate"] > 0.5


def test_bad_input_is_one_line(world, tmp_path, monkeypatch):
    """A traceback, or the memories of another model asked in silence."""
    world.save(tmp_path / "other.pt", seed=2)
    world.save(tmp_path / "foreign.pt", seed=1, tokenizer="gpt2:12345678")
    monkeypatch.chdir(tmp_path)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps(dict(question="Who is it? " * 90, answer="7")))
    beyond = tmp_path / "beyond.jsonl"
    beyond.write_text(json.dumps(dict(question="Who is it?", answer="7", reference=17)))
    for changes, line in [
        (dict(checkpoint="nowhere.pt"), "nowhere.pt: no checkpoint there"),
        (dict(checkpoint="other.pt"), "kb.bank"),
        (dict(checkpoint="foreign.pt"), "trained with tokenizer gpt2:12345678"),
        (dict(bank="no.bank"), f"no.bank: no knowledge base here; .*{world.data} --references"),
        (dict(data=tmp_path / "nodata"), "nodata/meta.json is missing"),
        (dict(questions_file="nowhere.jsonl"), "nowhere.jsonl is missing"),
        (dict(questions_file=long), "are more than max_context = 190"),
        (dict(questions_file=beyond), "names reference 17, which .* has not, of 17"),
        (dict(checkpoint="nowhere.pt", json=tmp_path), "is a directory"),  # before the work
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=line) as e:
            evaluation.main(args(world, **changes))
        assert "\n" not in str(e.value), line
    monkeypatch.setattr(sys, "argv", ["eval.py", *args(world, checkpoint="nowhere.pt")])
    with pytest.raises(SystemExit, match="^eval.py: nowhere.pt: no checkpoint there"):
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    for wrong in (
        ["--question", "3"],
        ["--questions", "0"],
        ["--examples", "-1"],
        ["--n_recall", "x"],
        ["--text"],
        ["--shots", "3"],
    ):
        with pytest.raises(SystemExit) as e:
            evaluation.main(wrong)
        assert e.value.code == 2


def test_docstrings():
    """A worked example that its function no longer gives."""
    found = doctest.testmod(evaluation)
    assert found.attempted >= 2 and not found.failed


def test_what_was_deleted_is_not_asked_for(tok, tmp_path):
    """A random memory that is gone ends the evaluation; an item, or a question, about a text that
    was deleted."""
    world = World(tmp_path / "world", tok)
    bank = world.open()[1]
    bank.delete([3, 5])
    flags = ["--checkpoint", world.checkpoint, "--data", world.data, "--bank", world.bank]
    flags = [*map(str, flags), "--device", "cpu", "--examples", "0"]
    result = evaluation.main(flags)  # no questions: cloze
    assert result["questions"] == 15 and result["hit_rate"] > 0.5
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(dict(question="Who is it?", answer="7", reference=5)))
    with pytest.raises(ValueError, match="names reference 5, which"):
        evaluation.main([*flags, "--questions_file", str(path)])
