"""experiments/choices.py: what is asked, recalled and counted."""

import json
import math

import pytest
import torch
from conftest import ROOT
from world import PLACES, World

import corpus
from experiments import choices
from experiments.choices import answer, load
from memory import Memories
from retrieval import Filtered, overlap


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    tok = corpus.tokenizer(ROOT / "data/cities")
    return World(tmp_path_factory.mktemp("choices") / "world", tok)


def items():
    """Questions about 9 places, the right choice at every position, given as number or as text."""
    for i in range(9):
        name = PLACES[i] + "holm"
        words = "has {} people.", "has a population of {}."  # choices of two lengths
        said = [f"{name} {words[(i + k) % 2].format(1013 * (i + 3 + k))}" for k in range(2 + i % 3)]
        right = said.pop(0)
        said.insert(i % (len(said) + 1), right)
        number = said.index(right)
        question = f"What is the population of {name}?"
        yield dict(question=question, choices=said, answer=right if i % 2 else number), number


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in items()))
    return path


def test_load(file, tmp_path):
    """An answer by its text taken for a number, a line of another form that is a traceback."""
    rows = load(file)
    assert rows == [(row["question"], row["choices"], number) for row, number in items()]
    assert {number for *_, number in rows} == {0, 1, 2}
    good = dict(question="q", choices=["a", "b"], answer=1)
    wrong_answers = [dict(good, answer=x) for x in (2, "c", -1, None, 1.0)]
    wrong_choices = [dict(good, choices=x) for x in ([], ["a", 3], ["a", " "], "ab", None)]
    for bad in (*wrong_answers, *wrong_choices, dict(good, question=""), dict(answer=1), [good], 5):
        wrong = tmp_path / "wrong.jsonl"
        wrong.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(ValueError, match="wrong.jsonl.* line 2: .*a line is") as e:
            load(wrong)
        assert "\n" not in str(e.value), bad
    for empty in ("", "\n \n", "\ufeff"):
        wrong.write_text(empty)
        with pytest.raises(ValueError, match="wrong.jsonl is empty"):
            load(wrong)
    with pytest.raises(ValueError, match="nowhere.jsonl is missing"):
        load(tmp_path / "nowhere.jsonl")


def test_load_reads_utf_8_from_anywhere(tmp_path):
    """A byte order mark, Windows' line ends, a blank last line taken for damage; bytes in another
    encoding read as if they were ours."""
    path = tmp_path / "items.jsonl"
    row = dict(question="Où ?", choices=["東京", "Kraków"], answer=1)
    line = json.dumps(row, ensure_ascii=False)
    for text in (line, "\ufeff" + line + "\n", line + "\r\n\r\n", "\n" + line + "\n \n"):
        path.write_bytes(text.encode())
        assert load(path) == [("Où ?", ["東京", "Kraków"], 1)]
    path.write_bytes(f"{line}\n\n{line}".encode("latin-1", "replace"))
    with pytest.raises(ValueError, match="items.jsonl is damaged: line 1 is not UTF-8"):
        load(path)


def test_filtered_recalls_no_copy_of_its_query(world):
    """A copy that is recalled all the same, its place left empty, the order or the scores lost."""
    retriever, bank = world.open()
    references = bank.references
    copied = references[4].tolist()
    other = world.tok.encode("Which country is Belholm in?")
    plain = retriever.search([copied, other], 12)
    ids, scores = Filtered(retriever, references).search([copied, other], 5)
    assert ids.shape == scores.shape == (2, 5) and plain[0][0, 0] == 4 and (ids >= 0).all()
    for row, query in enumerate((copied, other)):
        found = [i for i in plain[0][row] if i >= 0]
        kept = [i for i in found if overlap(query, references[int(i)]) <= 2 / 3]
        assert ids[row].tolist() == kept[:5]
        score = dict(zip(plain[0][row].tolist(), plain[1][row].tolist(), strict=True))
        assert scores[row].tolist() == [score[i] for i in kept[:5]]
    assert 4 not in ids[0] and ids[1].tolist() == plain[0][1, :5].tolist()
    none = Filtered(retriever, references, threshold=0.0).search([copied], 3)[0]
    assert none.tolist() == [[-1, -1, -1]]  # each shares a token with it


def test_answer_is_the_likeliest_choice_a_character(world, file, monkeypatch):
    """A long choice at a disadvantage, memories recalled by the shots or the choices, examples
    without their answers, a condition with another's memories."""
    rows = load(file)
    shots = load(file)[7:]
    retriever, bank = world.open()
    asked = []
    calls = []
    unfair = []

    def search(queries, k):
        asked.append(queries)
        return retriever.search(queries, k)

    def spy(model, pairs, memories=None, recall=None):
        calls.append((pairs, memories, recall))
        return real(model, pairs, memories, recall)

    real = choices.likelihood
    monkeypatch.setattr(choices, "likelihood", spy)
    finder = type("Finder", (), dict(search=staticmethod(search)))
    right = answer(world.model, world.tok, rows, shots, finder, bank)
    assert asked == [[world.tok.encode(question)] for question, _, _ in rows]
    assert list(right) == ["plain", "none", "recalled"] and len(calls) == 3 * len(rows)
    text = "".join(f" {q} {said[number]}\n" for q, said, number in shots)
    for i, (question, said, number) in enumerate(rows):
        for (pairs, memories, recall), condition in zip(calls[3 * i :], right, strict=False):
            assert [world.tok.decode(after) for _, after in pairs] == [f" {x}" for x in said]
            assert {world.tok.decode(before) for before, _ in pairs} == {f"{text} {question}"}
            scores = []
            for before, after in pairs:  # each choice alone, in one full forward
                tokens = torch.tensor([before + after])
                table = None
                if condition == "recalled":
                    found = retriever.search([question], 3)[0]
                    assert memories.count.shape == (3,) and recall.shape == (len(said), 3)
                    table = torch.arange(3).expand(1, -(-tokens.shape[1] // 16), -1)
                    pool = bank.recall(found[0])
                elif condition == "none":
                    pool = Memories.empty(world.model.config)
                logits = world.model(
                    tokens, memories=None if condition == "plain" else pool, recall=table
                )[0]
                logp = logits[0, len(before) - 1 : -1].log_softmax(-1)
                scores.append(float(logp[range(len(after)), after].sum().detach()))
            best = max(range(len(said)), key=lambda k: scores[k] / len(f" {said[k]}"))
            unfair.append(best != max(range(len(said)), key=lambda k: scores[k]))
            assert right[condition][i] == (best == number)
    assert any(unfair) and {True, False} == {x for each in right.values() for x in each}


def test_main(world, file, tmp_path, capsys):
    """An accuracy of other items, an error that is no standard error, a flag that is dropped."""
    flags = ["--checkpoint", world.checkpoint, "--data", world.data, "--bank", world.bank]
    flags = [str(file), *map(str, flags), "--device", "cpu"]
    out = tmp_path / "choices.json"
    result = choices.main([*flags, "--json", str(out)])
    assert json.loads(out.read_text()) == result and result["items"] == 9
    for condition in ("plain", "none", "recalled"):
        p = result[condition]["accuracy"]
        assert p * 9 == pytest.approx(round(p * 9))
        assert result[condition]["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / 8))
    assert "| recalled by the question: top 3, overlap at most 2/3 | 9 |" in capsys.readouterr().out
    more = choices.main([*flags, "--shots", "1", "--shots_from", str(file), "--n_recall", "1"])
    assert more["shots"] == 1 and "top 1" in capsys.readouterr().out
    many = tmp_path / "many.jsonl"
    many.write_text(file.read_text() * 3)
    for wrong, line in [
        (["--shots", "2"], "--shots needs --shots_from"),
        (["--shots", "10", "--shots_from", str(file)], "has 9 examples, --shots wants 10"),
        (["--shots", "20", "--shots_from", str(many)], "and 20 --shots are .* max_context = 190"),
    ]:
        with pytest.raises(ValueError, match=line):
            choices.main([*flags, *wrong])
