"""Retrieval: eq. (3.3), the hash embedder, the index, and the neighbours of training chunks."""

import doctest
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import corpus
import retrieval
from common import UserError
from retrieval import HashEmbedder, Retriever, exceeds, neighbors, open_neighbors, overlap

NAMES = "Kyiv Uzhhorod Lviv Odesa Ruse Varna Plovdiv Burgas Turku Oulu Tampere Espoo Lahti".split()


class Bytes:
    """A tokenizer of one token a byte, so that these tests need no data set."""

    bos, n_vocab, id = 256, 257, "bytes:1"

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(int(t) for t in ids if 0 <= t < 256).decode(errors="replace")


def text(i, people=None):
    return f"{NAMES[i]} is a city. {NAMES[i]} has {people or 1013 * (i + 3)} people."


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data directory of 13 references, a split of two documents, and the byte tokenizer."""
    monkeypatch.setattr(corpus, "tokenizer", lambda name: Bytes())
    common.write_json(tmp_path / "meta.json", dict(n_vocab=257, tokenizer="bytes"))
    rows = [Bytes().encode(text(i)) for i in range(len(NAMES))]
    corpus.References.create(tmp_path / "kb", rows, 257)
    # Lviv's reference stands here word for word; Turku is only spoken of
    split = Bytes().encode(f"Look: {text(2)} And how many live in Turku? Turku is full of people.")
    corpus.write_tokens(tmp_path / "explicit.bin", split, 257)
    return tmp_path


def make(data, **options):
    references = corpus.References.open(data / "kb")
    return references, Retriever.build(
        f"{data}/kb.index", references, str(data), "hash:67", progress=False, **options
    )


def brute(t, r):
    """Eq. (3.3) by the textbook table, for every window of t."""
    best = 0
    for start in range(len(t)):
        row = [0] * (len(r) + 1)
        for x in t[start : start + 2 * len(r) + 1]:
            old = row[:]
            for j, y in enumerate(r):
                row[j + 1] = old[j] + 1 if x == y else max(old[j + 1], row[j])
        best = max(best, row[-1])
    return best / len(r)


def test_worked_examples():
    """A docstring whose example no longer holds."""
    result = doctest.testmod(retrieval)
    assert result.attempted >= 3 and result.failed == 0


def test_overlap_is_brute_force():
    """Windows one token too wide or narrow, a skipped window, a carry lost in the bit trick; and
    a bound in `exceeds` that throws away a copy."""
    g = random.Random(5)
    for _ in range(700):
        v = g.choice([2, 3, 7])
        t = [g.randrange(v) for _ in range(g.randrange(26))]
        r = [g.randrange(v) for _ in range(g.randrange(1, 7))]
        exact = brute(t, r)
        assert overlap(t, r) == exact, (t, r)
        for threshold in (0, 1 / 3, 0.5, 2 / 3, 0.9, 1, exact):
            assert exceeds(t, r, threshold) == (exact > threshold), (t, r, threshold)


def test_overlap_of_long_sequences():
    """References longer than a machine word; arrays and tensors in place of lists."""
    g = np.random.default_rng(3)
    t, r = g.integers(0, 5, 251), g.integers(0, 5, 71)
    assert overlap(t, r) == overlap(torch.tensor(t), torch.tensor(r)) == brute(list(t), list(r))
    assert overlap(np.concatenate([t, r, t]), r) == 1


def test_overlap_of_nothing():
    """A division by zero without a word about what is empty."""
    with pytest.raises(ValueError, match="empty reference"):
        overlap([1, 2], [])
    with pytest.raises(ValueError, match="empty reference"):
        exceeds([1, 2], [], 0.9)
    assert overlap([], [1, 2]) == 0


def test_hash_embedder_is_the_same_everywhere():
    """Python's salted hash(), or a platform's byte order, in what an index is made of."""
    e = HashEmbedder(11).fit(["Kyiv has people", "Lviv has time", ""])
    assert e.id == "hash:11:2:3d8dfa710831"
    golden = [
        0.0804663,
        -0.3827357,
        0,
        0.8676163,
        0.0804663,
        -0.0103434,
        -0.1413367,
        -0.0195959,
        0.1413367,
        0.2022071,
        0.0804663,
    ]
    assert np.allclose(e.encode(["Kyiv, LVIV and Сновськ"])[0], golden, atol=1e-6)


def test_hash_embedder_edges(monkeypatch):
    """NaN for a text without words; vectors that depend on the batch or on a full cache."""
    fresh = HashEmbedder(67)
    e = fresh.fit(text(i) for i in range(13))
    assert fresh.id != e.id  # fitting leaves the old one, and what it embedded, as they were
    texts = ["", "?!", "Kyiv", "Lviv has", "名古屋 市", "Kyiv Kyiv Kyiv", text(3)]
    x = e.encode(texts)
    assert x.dtype == np.float32 and x.shape == (7, 67)
    assert np.allclose(np.linalg.norm(x, axis=1), [0, 0, 1, 1, 1, 1, 1], atol=1e-5)
    assert e.encode([]).shape == (0, 67)
    monkeypatch.setattr(HashEmbedder, "CACHE", 3)
    small = HashEmbedder(67, e.state)
    assert np.array_equal(np.concatenate([small.encode([t]) for t in texts]), x)


def test_hash_embedder_finds_the_city():
    """Features without weights: what all references share drowns the name."""
    e = HashEmbedder().fit(text(i) for i in range(13))
    kb = e.encode([text(i) for i in range(13)])
    questions = e.encode([f"What is the population of {name}?" for name in NAMES])
    assert ((questions @ kb.T).argmax(1) == np.arange(13)).all()


def test_unknown_embedder():
    """A misspelt name that silently becomes the default; a missing package that says nothing."""
    with pytest.raises(ValueError, match="unknown embedder 'hsah'"):
        retrieval.embedder("hsah")
    try:
        import transformers  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install transformers"):
            retrieval.embedder("bge-m3")


def test_index_comes_back_from_disk(data):
    """An index that answers otherwise once it has been written; token queries that are embedded
    unlike their text; padding that becomes text."""
    _, made = make(data)
    again = Retriever.open(f"{data}/kb.index")
    questions = [f"How many people has {name}?" for name in NAMES[3:8]]
    ids, scores = again.search(questions, 3)
    assert ids.dtype == np.int64 and scores.dtype == np.float32
    assert ids.shape == scores.shape == (5, 3)
    assert ids[:, 0].tolist() == [3, 4, 5, 6, 7]
    assert (np.diff(scores) <= 0).all()
    tokens = [Bytes().encode(q) for q in questions]
    padded = torch.full((5, 41), -1)
    for row, q in zip(padded, tokens, strict=True):
        row[: len(q)] = torch.tensor(q)
    for other in (made.search(questions, 3), again.search(tokens, 3), again.search(padded, 3)):
        assert np.array_equal(other[0], ids) and np.array_equal(other[1], scores)


def test_another_embedder_is_refused(data):
    """References embedded one way and queries another: numbers come out, but mean nothing."""
    make(data)
    other = HashEmbedder(67).fit(["other texts"])
    for wrong in (other, "hash:61"):
        with pytest.raises(ValueError, match="hash:67:.*hash:6.*make it anew"):
            Retriever.open(f"{data}/kb.index", wrong)
    np.save(data / "kb.index" / "embedder.npy", other.state)
    with pytest.raises(ValueError, match="do not compare"):
        Retriever.open(f"{data}/kb.index")


def test_stale_index(data):
    """References that have changed since: ids that name other texts. The cure must run as it is."""
    references, _ = make(data)
    assert len(Retriever.open(f"{data}/kb.index", references=references)) == 13
    references.append(Bytes().encode("Zubrowka"))
    with pytest.raises(ValueError, match="stale.*make it anew with") as e:
        Retriever.open(f"{data}/kb.index", references=references)
    command = str(e.value).split("python retrieval.py ")[1]
    assert command == f"index --data {data} --references kb --embedder hash:67"
    retrieval.main(command.split())
    assert len(Retriever.open(f"{data}/kb.index", references=references)) == 14


def test_another_tokenizer_is_refused(data, monkeypatch):
    """Token queries decoded with a tokenizer that the index was not made with."""
    make(data)
    monkeypatch.setattr(Bytes, "id", "bytes:2")
    with pytest.raises(ValueError, match="tokenizer bytes:1"):
        Retriever.open(f"{data}/kb.index").search([[75]], 1)


def test_bad_queries(data):
    """No reference asked for; one text taken for a list of letters."""
    _, r = make(data)
    for k in (0, -3):
        with pytest.raises(UserError, match=f"{k} references asked for"):
            r.search(["Kyiv"], k)
    with pytest.raises(UserError, match="list of texts"):
        r.search("Kyiv", 1)


@pytest.mark.parametrize("factory", [None, "IVF2,Flat"])
def test_add_remove_replace(data, factory):
    """Ids that shift when one is removed (an IDMap over an inverted index does that); changes
    that are lost between memory and disk; an id that stands twice."""
    references, r = make(data, factory=factory)
    zubrowka = "Zubrowka City has 4242 people."
    r.add([29], [zubrowka])
    assert r.search(["How many people live in Zubrowka City?"], 1)[0][0, 0] == 29
    r.remove([3])
    assert 3 not in r.search([text(3)], len(r) // 2)[0]
    r.replace([4], ["Gotham has 77 people."])
    r.save(references)
    for now in (r, Retriever.open(f"{data}/kb.index")):
        assert len(now) == 13
        found = now.search([zubrowka, "Gotham", text(5), text(12)], 1)[0]
        assert found[:, 0].tolist() == [29, 4, 5, 12]
        now.remove([7])
        assert len(now) == 12 and now.search([text(8)], 1)[0][0, 0] == 8
    with pytest.raises(ValueError, match="there already"):
        r.add([29], ["x"])
    for wrong in (r.remove, lambda ids: r.replace(ids, ["x"])):
        with pytest.raises(ValueError, match=r"\[3\]"):
            wrong([3])


def test_killed_while_saving(data, monkeypatch):
    """Half of the changes on disk, or new vectors beside what is said of old ones."""
    references, r = make(data)
    r.add([29], ["Zubrowka"])
    with monkeypatch.context() as m:
        m.setattr(common.os, "replace", lambda *_: 1 / 0)  # dies before the file is in its place
        with pytest.raises(ZeroDivisionError):
            r.save()
    assert len(Retriever.open(f"{data}/kb.index")) == 13
    r.save()
    assert len(Retriever.open(f"{data}/kb.index")) == 14
    with monkeypatch.context() as m:
        m.setattr(retrieval, "write_json", dying_at("meta.json"))
        with pytest.raises(ZeroDivisionError):
            make(data, factory="SQ8")
    with pytest.raises(UserError, match="half renewed"):
        Retriever.open(f"{data}/kb.index")
    again = Retriever.build(f"{data}/kb.index", references, str(data), "hash:67", "SQ8", False)
    assert len(again) == 13  # and the changes of the older index are gone
    (data / "kb.index" / "meta.json").unlink()
    with pytest.raises(UserError, match="no index here"):
        Retriever.open(f"{data}/kb.index")


def dying_at(name):
    """write_json, but for the file of this name, at which it dies."""

    def write(path, obj):
        if Path(path).name == name:
            raise ZeroDivisionError
        common.write_json(path, obj)

    return write


def test_neighbours_are_no_copies(data):
    """The answer in memory: a chunk that is given the reference it was cut from. Ragged rows."""
    references, r = make(data)
    tokens = corpus.open_tokens(data, "explicit")
    ids = neighbors(tokens, 17, references, r, 5, context=119, threshold=0.9)
    assert ids.shape == (len(tokens) // 17, 5) and ids.dtype == np.int32
    free = neighbors(tokens, 17, references, r, 5, context=119, threshold=1)
    assert 2 in free and 2 not in ids  # Lviv; 1 = nothing is dropped
    # exactly what a search and eq. (3.3) say, chunk by chunk, whatever the threshold
    for threshold in (0.5, 0.6, 0.7):
        ids = neighbors(tokens, 17, references, r, 5, context=119, threshold=threshold)
        for c, row in enumerate(ids.tolist()):
            t = tokens[c * 17 // 119 * 119 :][:119]
            found = r.search([tokens[c * 17 : c * 17 + 17]], 8)[0][0]
            good = [i for i in found if i >= 0 and overlap(t, references[i]) <= threshold][:5]
            assert row == good + [-1] * (5 - len(good))
    with pytest.raises(ValueError, match="multiple of chunk_len"):
        neighbors(tokens, 17, references, r, 5, context=120)


def test_neighbour_file(data, monkeypatch):
    """A resume that starts anew, repeats or skips rows; a file trusted because it exists."""
    references, r = make(data)
    tokens, path = corpus.open_tokens(data, "explicit"), f"{data}/explicit.neighbors.bin"
    whole = neighbors(tokens, 7, references, r, 2, context=35)

    def write(**options):
        retrieval.write_neighbors(
            path, tokens, 7, references, r, 2, batch=3, progress=False, **dict(context=35) | options
        )

    starts, real = [], neighbors

    def dying(*args, start, **options):
        if len(starts) == 2:
            raise KeyboardInterrupt
        starts.append(start)
        return real(*args, start=start, **options)

    with monkeypatch.context() as m:
        m.setattr(retrieval, "neighbors", dying)
        with pytest.raises(KeyboardInterrupt):
            write()
        with pytest.raises(UserError, match="no neighbours here"):
            open_neighbors(data, "explicit")
        starts.clear()
        with pytest.raises(KeyboardInterrupt):
            write()
        assert starts == [6, 9]  # goes on
        starts.clear()
        with pytest.raises(KeyboardInterrupt):
            write(threshold=0.8)
        assert starts == [0, 3]  # other settings: anew
    write()
    rows, name = open_neighbors(data, "explicit", chunk_len=7)
    assert np.array_equal(rows, whole) and name == "kb"
    with pytest.raises(ValueError, match="chunk_len 7, not 9"):
        open_neighbors(data, "explicit", chunk_len=9)
    cure = r"python retrieval.py neighbors --data \S+ --split explicit --references"
    with pytest.raises(ValueError, match=f"{cure} kb --chunk_len 9 --context 35 --k 2"):
        open_neighbors(data, "explicit", chunk_len=9)
    with pytest.raises(
        UserError, match="--split other --references kb --chunk_len 9 --context 2048"
    ):
        open_neighbors(data, "other", chunk_len=9)
    with pytest.raises(ValueError, match="smaller --chunk_len"):
        retrieval.write_neighbors(path, tokens[:6], 7, references, r, 2, context=35)
    corpus.write_tokens(data / "explicit.bin", tokens[::-1], 257)  # as many, but others
    with pytest.raises(ValueError, match="for tokens"):
        open_neighbors(data, "explicit")
    corpus.write_tokens(data / "explicit.bin", [75] * 5, 257)
    with pytest.raises(ValueError, match="for n_tokens"):
        open_neighbors(data, "explicit")
    references.append(Bytes().encode("Zubrowka"))
    with pytest.raises(ValueError, match="for references"):
        open_neighbors(data, "explicit")
    with pytest.raises(ValueError, match="index of other references"):
        write()


def test_command_line(data, capsys):
    """Commands of the README that do not run; flags that are swallowed."""
    common = ["--data", str(data), "--references", "kb"]
    retrieval.main(["index", *common])
    retrieval.main(["neighbors", *common, "--chunk_len", "16", "--k", "2", "--context", "64"])
    assert "13 references, hash:512:" in capsys.readouterr().out
    rows, _ = open_neighbors(data, "explicit", chunk_len=16)
    assert rows.shape == (len(corpus.open_tokens(data, "explicit")) // 16, 2)
    wrongs = ["index", *common, "--k", "3"], ["index"], ["neighbors", *common, "--factory", "x"]
    for wrong in wrongs:
        with pytest.raises(SystemExit):
            retrieval.main(wrong)
    with pytest.raises(UserError, match="nowhere.bin is missing"):
        retrieval.main(["index", "--data", str(data), "--references", "nowhere"])
    with pytest.raises(UserError, match="unknown embedder"):
        retrieval.main(["index", *common, "--embedder", "none"])


def test_training_needs_no_faiss():
    """Catches an import of FAISS where nothing is searched: a GPU machine may not have it."""
    code = "import sys; sys.modules['faiss'] = None; import train, retrieval, sample, write, eval"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
