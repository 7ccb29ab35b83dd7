"""Retrieval: eq. (3.3), the hash embedder, the index, and the neighbours of training chunks."""

import doctest
import io
import json
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import corpus
import embed
import index
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
    options = dict(encoder="hash:67", progress=False) | options
    return references, Retriever.build(f"{data}/kb.index", references, str(data), **options)


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
    for module in (embed, index, retrieval):
        result = doctest.testmod(module)
        assert result.attempted >= 1 and result.failed == 0


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
        m.setattr(index, "write_sealed", dying_at("meta.json"))
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


def test_a_title_does_not_hide_a_copy(data):
    """A body that stands in the window word for word, under a title that does not, or only once: a
    quarter of all chunks of a text with titles had its copy for a neighbour."""
    tok = corpus.tokenizer(data)
    body = "Lviv lies on seven hills and has many old churches and bridges."
    others = [text(i) for i in range(7)]
    rows = [tok.encode(f"A guide to the west: {body}"), *map(tok.encode, others)]
    references = corpus.References.create(data / "titled", rows, tok.n_vocab)
    r = Retriever.build(data / "titled.index", references, str(data), "hash:67", progress=False)
    tokens = np.array(tok.encode(f"\n{body} It is far away from here and there."))
    chunk = len(tokens) // 2
    how = dict(context=2 * chunk, threshold=0.9)
    assert overlap(tokens, rows[0]) < 0.9 and 0 in neighbors(tokens, chunk, references, r, 1, **how)
    n_title = len(tok.encode("A guide to the west:")) + len(tok.encode("Lviv"))
    titles = np.array([n_title, *[0] * len(others)], "<i8")
    (data / "titled.titles").write_bytes(titles.tobytes())
    references = corpus.References.open(data / "titled")
    assert (
        references.body(0).tolist() == rows[0][n_title:] and references.body(3).tolist() == rows[3]
    )
    assert 0 not in neighbors(tokens, chunk, references, r, 2, **how)
    for wrong in (titles[:-1], titles + 999, titles - 99):
        (data / "titled.titles").write_bytes(wrong.tobytes())
        with pytest.raises(UserError, match="titled.titles does not fit .*titled.idx"):
            corpus.References.open(data / "titled").body(0)
    corpus.References.create(data / "titled", rows[1:], tok.n_vocab)
    assert not (data / "titled.titles").exists()  # it told of other references


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
    with pytest.raises(ValueError, match="multiple of chunk_len"):
        retrieval.write_neighbors(path, tokens, 7, references, r, 2, context=36)
    assert np.array_equal(open_neighbors(data, "explicit", chunk_len=7)[0], whole)  # still there
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


def test_shards_of_neighbours(data, monkeypatch, capsys):
    """Chunks that are lost, doubled or shifted where shards meet; a shard of other flags among
    them; processes at once that write into each other's rows."""
    references, r = make(data)
    tokens, path = corpus.open_tokens(data, "explicit"), f"{data}/explicit.neighbors.bin"
    whole = neighbors(tokens, 7, references, r, 2, context=35)
    n_chunks = len(whole)

    def write(i, n, threshold=0.9):
        how = dict(context=35, batch=3, progress=False, shard=(i, n), threshold=threshold)
        return retrieval.write_neighbors(path, tokens, 7, references, r, 2, **how)

    for n in (2, 3, n_chunks + 5):  # of the last division some shards are empty
        write(1, 2, threshold=0.5)  # of something else: nothing of it stays
        assert [write(i, n) for i in range(n, 0, -1)] == [False] * (n - 1) + [True]
        assert np.array_equal(open_neighbors(data, "explicit", chunk_len=7)[0], whole)
        assert sorted(file.name for file in data.glob("explicit.neighbors*")) == [
            "explicit.neighbors.bin",
            "explicit.neighbors.json",
        ]
    Path(path).unlink()
    real = neighbors

    def slow(*args, **options):
        time.sleep(0.02)
        return real(*args, **options)

    monkeypatch.setattr(retrieval, "neighbors", slow)
    with ThreadPoolExecutor(4) as threads:
        made = [threads.submit(write, *shard) for shard in [(1, 1), (1, 2), (1, 1), (2, 2)]]
        assert [future.result() for future in made].count(True) >= 3
    assert np.array_equal(open_neighbors(data, "explicit", chunk_len=7)[0], whole)
    monkeypatch.setattr(retrieval, "neighbors", None)
    assert write(1, 1)  # all there: nothing is searched again

    monkeypatch.setattr(retrieval, "neighbors", real)
    Path(path).unlink()
    flags = ["neighbors", "--data", str(data), "--chunk_len", "7", "--k", "2", "--context", "35"]
    retrieval.main([*flags, "--shard", "2/2"])
    assert "shard 2 of 2 is done; the last one joins them all" in capsys.readouterr().out
    retrieval.main([*flags, "--shard", "1/2"])
    assert f"{n_chunks} chunks x 2" in capsys.readouterr().out
    assert np.array_equal(open_neighbors(data, "explicit", chunk_len=7)[0], whole)
    shutil.rmtree(data / "kb.index")
    with pytest.raises(UserError, match="no index yet, which all shards need; make it anew with"):
        retrieval.main([*flags, "--shard", "1/2"])
    with pytest.raises(UserError, match="--processes: not with --shard"):
        retrieval.main([*flags, "--shard", "1/2", "--processes", "2"])


@pytest.fixture(scope="module")
def cities(tmp_path_factory):
    """A data set with a real tokenizer, for commands that run in processes of their own."""
    path = tmp_path_factory.mktemp("cities")
    shutil.copy(ROOT / "data/cities/tokenizer.json", path)
    common.write_json(path / "meta.json", dict(tokenizer=".", n_vocab=4096))
    tokenizer = corpus.tokenizer(path)
    rows = [tokenizer.encode(text(i % 13) + f" Its number is {7 * i}.") for i in range(3300)]
    corpus.References.create(path / "kb", rows, 4096)
    corpus.write_tokens(path / "explicit.bin", np.concatenate(rows[:2000]), 4096)
    return path


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def in_processes(*commands):
    """Runs commands at once -> the two outputs of each; none of them fails."""
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [subprocess.Popen([str(word) for word in words], **how) for words in commands]
    outputs = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0 and "Traceback" not in errors, errors
    return outputs


@pytest.mark.slow
def test_processes_make_the_same(cities):
    """Under torchrun, as several processes of one command, or as the same command given twice at
    once: a traceback, a damaged file, other bytes than those of one process."""
    script = ROOT / "retrieval.py"
    near = (script, "neighbors", "--data", cities, "--chunk_len", 8, "--context", 64, "--k", 2)
    whole = (script, "index", "--data", cities)
    indexed = ("kb.index/index.faiss", "kb.index/meta.json", "kb.index/embedder.npy")
    found = ("explicit.neighbors.bin", "explicit.neighbors.json")
    made = {}
    for files, commands in (
        (indexed, [(sys.executable, *whole)]),
        (found, [(sys.executable, *near)]),
        (indexed + found, [(*TORCHRUN, *near)]),
        (indexed + found, [(sys.executable, *near), (sys.executable, *near)]),
        (indexed + found, [(sys.executable, *near, "--processes", 3)]),
    ):
        for name in files:
            (cities / name).unlink(missing_ok=True)
        outputs = in_processes(*commands)
        said = "3,300 references" if files == indexed else "chunks x 2"
        assert all(out.count(said) >= 1 for out, _ in outputs)
        for name in files:
            assert (cities / name).read_bytes() == made.setdefault(
                name, (cities / name).read_bytes()
            )
        assert not list(cities.glob("*.part")) and not (cities / "kb.index/parts").exists()


@pytest.mark.slow
def test_a_process_that_fails(cities):
    """A command that waits for ever, or says that all is well, when one of its processes fails; an
    error without its reason."""
    words = ["neighbors", "--data", str(cities), "--chunk_len", "8", "--context", "63"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "retrieval.py"), *words, "--processes", "2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "--context 63: give a multiple of chunk_len" in done.stderr
    assert "a process of 2 has failed" in done.stderr and "Traceback" not in done.stderr


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


# -- Nothing found ----------------------------------------------------------------------------

NO_WORDS = ["???", "\n\n", "", " \t", "\u2026!", "\u0301"]


def nothing(result, shape):
    ids, scores = result
    return ids.shape == scores.shape == shape and (ids == -1).all() and (scores == -1).all()


@pytest.mark.parametrize("factory", [None, "SQ8", "IVF2,Flat", "IVF2_HNSW4,SQ8"])
def test_a_query_without_words_finds_nothing(data, factory):
    """Arbitrary memories, read because the first rows of the index are nobody's neighbours."""
    _, r = make(data, factory=factory)
    assert nothing(r.search(NO_WORDS, 5), (6, 5))
    tokens = [[256], [], [-1, -1, -1], Bytes().encode("?!"), [10] * 32]
    assert nothing(r.search(tokens, 4), (5, 4))
    assert nothing(r.search(torch.full((2, 3), -1), 1), (2, 1))
    ids = r.search(["???", text(3), "\n"], 2)[0]
    assert (ids[[0, 2]] == -1).all() and ids[1, 0] == 3
    assert r.search([], 5)[0].shape == (0, 5)
    r.add([40], ["Zubrowka has people"])
    r.remove([2])
    assert nothing(r.search(NO_WORDS, 5), (6, 5))


def test_more_references_than_there_are(data):
    """A knowledge base of two references that cannot be asked; places filled with repeats."""
    _, r = make(data)
    ids, scores = r.search([text(3)], 30)
    assert ids.shape == (1, 30) and len(set(ids[0][ids[0] >= 0])) == (ids >= 0).sum() >= 5
    assert (scores[ids >= 0] > 0).all() and (scores[ids < 0] == -1).all()
    r.remove(range(2, 13))
    assert len(r) == 2
    ids = r.search([text(1), "Burgas"], 5)[0]
    assert ids[0, 0] == 1 and {0, 1} >= set(ids[0][:2]) and (ids[:, 2:] == -1).all()
    r.remove([0, 1])
    assert len(r) == 0 and nothing(r.search([text(1)], 5), (1, 5))
    r.add([7], [text(7)])
    assert r.search([text(7)], 5)[0].tolist() == [[7, -1, -1, -1, -1]]


def test_small_and_empty_bases(data):
    """An index of 2, 1 or 0 references that cannot be made or asked."""
    for n in (2, 1):
        refs = corpus.References.create(
            data / "few", [Bytes().encode(text(i)) for i in range(n)], 257
        )
        r = Retriever.build(f"{data}/few.index", refs, str(data), "hash:67", progress=False)
        ids = r.search([text(0)], 5)[0]
        assert ids[0, 0] == 0 and (ids[0, n:] == -1).all()

    class Empty(list):
        path, hash = data / "none", "0"

    r = Retriever.build(f"{data}/none.index", Empty(), str(data), "hash:67", progress=False)
    assert len(r) == 0 and nothing(r.search([text(0)], 3), (1, 3))
    r.add([0], [text(0)])
    r.save(Empty())
    r = Retriever.open(f"{data}/none.index", references=Empty())
    assert r.search([text(0)], 3)[0].tolist() == [[0, -1, -1]]


class Broken:
    """An embedder of 5 numbers that gives NaN or infinity for texts with a q."""

    name = id = "broken"
    dim = 5
    state = np.zeros(0, "<u4")
    value = np.nan

    def fit(self, texts):
        return self

    def encode(self, texts):
        out = np.ones((len(texts), 5), np.float32) / 5**0.5
        out[["q" in x for x in texts]] *= self.value
        return out


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedder_that_gives_no_numbers(data, value):
    """NaN in the index, where it is compared with every query; NaN that finds reference 0."""
    broken = Broken()
    broken.value = value
    _, r = make(data, encoder=broken)
    assert nothing(r.search(["q"], 3), (1, 3))
    assert (r.search(["x", "q"], 3)[0][0] >= 0).all()
    with pytest.raises(UserError, match="broken gives NaN"):
        r.add([20], ["q"])
    rows = [Bytes().encode("good"), Bytes().encode("q")]
    refs = corpus.References.create(data / "few", rows, 257)
    with pytest.raises(UserError, match="broken gives NaN for reference 1"):
        Retriever.build(f"{data}/few.index", refs, str(data), broken, progress=False)


def test_references_without_words(data):
    """A blank reference that is recalled for want of better; one that cannot be given a text."""
    rows = [Bytes().encode(x) for x in ("Kyiv has people", "?!", "\n", "Lviv has time")]
    refs = corpus.References.create(data / "few", rows, 257)
    for factory in (None, "SQ8"):
        Retriever.build(f"{data}/few.index", refs, str(data), "hash:67", factory, progress=False)
        r = Retriever.open(f"{data}/few.index", references=refs)
        assert len(r) == 4 and not {1, 2} & set(r.search(["Kyiv", "people"], 4)[0].ravel().tolist())
        r.replace([1], ["Zubrowka"])
        r.replace([0], ["..."])
        r.remove([2])
        r.save()
        r = Retriever.open(f"{data}/few.index")
        assert len(r) == 3 and r.search(["Zubrowka"], 1)[0].tolist() == [[1]]
        assert nothing(r.search(["Kyiv"], 1), (1, 1)) or 0 not in r.search(["Kyiv"], 4)[0]
        with pytest.raises(UserError, match="there already"):
            r.add([0], ["x"])


def test_chunks_of_line_breaks_have_no_neighbours(data):
    """Training chunks that read reference 0 because they say nothing."""
    references, r = make(data)
    tokens = np.array([10] * 34 + Bytes().encode(text(5)) + [10] * 17 + [256] * 34)
    ids = neighbors(tokens, 17, references, r, 3, context=17, threshold=1)
    blank = [c for c in range(len(ids)) if set(tokens[17 * c : 17 * c + 17]) <= {10, 256}]
    assert len(blank) >= 4 and (ids[blank] == -1).all() and (ids[2] >= 0).any()


def test_random_of_nothing():
    """Noise from an empty base: a ValueError of NumPy's, or reference 0 that is not there."""
    assert nothing(retrieval.Random(0).search(["x", "y"], 3), (2, 3))


# -- Live changes -----------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [None, "IVF2,Flat"])
def test_changes_equal_an_index_made_anew(data, factory):
    """A change that is lost, doubled, or outlived by the old text, after many of them."""
    references, r = make(data, factory=factory)
    g = random.Random(7)
    live = {i: text(i) for i in range(13)}
    for step in range(120):
        i = g.randrange(21)
        words = f"{g.choice(NAMES)}berg {step} has {g.randrange(99)} people"
        if i not in live:
            r.add([i], [words])
            live[i] = words
        elif g.random() < 0.4:
            r.remove([i])
            del live[i]
        else:
            r.replace([i], [words])
            live[i] = words
        if step % 40 == 39:
            r.save(references)
            r = Retriever.open(f"{data}/kb.index", references=references)
        assert len(r) == len(live)
    ids = np.array(sorted(live))
    queries = [*live.values(), *(text(i) for i in range(13)), "people"]
    exact = r.embedder.encode(queries) @ r.embedder.encode([live[i] for i in ids]).T
    found, scores = r.search(queries, 4)
    best = np.sort(exact, axis=1)[:, ::-1][:, :4]
    if factory is None:
        assert np.allclose(scores, np.where(best > 0, best, -1), atol=1e-5)
    assert set(found.ravel().tolist()) <= {-1, *live}
    own = np.take_along_axis(exact, np.searchsorted(ids, found.clip(0)), 1)
    assert np.allclose(np.where(found >= 0, own, -1), scores, atol=1e-5)


def test_update_takes_what_comes(data):
    """Catching up that stops at a reference that is new, gone already, or changed twice."""
    _, r = make(data)
    r.update([3, 20, 5, 21], ["Zubrowka", "Gotham", "", ""])
    r.update([20, 5, 7], ["Atlantis", "", "..."])
    assert len(r) == 13  # 13 - reference 5 + reference 20; 7 has no word, but is there
    found = r.search(["Zubrowka", "Gotham", "Atlantis", text(5), text(7)], 1)[0][:, 0].tolist()
    assert found[0] == 3 and found[2] == 20 and found[1] != 20 and not {5, 7} & set(found[3:])
    r.update([5], [text(5)])
    r.replace([7], [text(7)])
    assert r.search([text(5), text(7)], 1)[0].tolist() == [[5], [7]] and len(r) == 14
    with pytest.raises(UserError, match="no references"):
        r.remove([21])


def test_a_handle_out_of_date_does_not_write(data):
    """Two handles of one index: what the first has saved is gone when the second saves."""
    make(data)
    first = Retriever.open(f"{data}/kb.index")
    second = Retriever.open(f"{data}/kb.index")
    first.add([20], ["Zubrowka"])
    first.save()
    first.add([21], ["Gotham"])
    first.save()
    second.add([22], ["Atlantis"])
    with pytest.raises(UserError, match="changed by another process"):
        second.save()
    now = Retriever.open(f"{data}/kb.index")
    assert now.search(["Zubrowka", "Gotham"], 1)[0].tolist() == [[20], [21]] and len(now) == 15


def test_bad_changes_change_nothing(data):
    """Half of a change that is refused."""
    _, r = make(data)
    before = r.search([text(i) for i in range(13)], 3)
    for bad in (
        lambda: r.add([20, 20], ["a", "b"]),
        lambda: r.add([20, 21], ["a"]),
        lambda: r.add([20, 3], ["a", "b"]),
        lambda: r.add([-1], ["a"]),
        lambda: r.remove([2, 99]),
        lambda: r.replace([2, 99], ["a", "b"]),
        lambda: r.replace([2, 3], ["a"]),
        lambda: r.replace([2, 2], ["a", "b"]),
    ):
        with pytest.raises(UserError):
            bad()
        assert len(r) == 13
        for a, b in zip(r.search([text(i) for i in range(13)], 3), before, strict=True):
            assert np.array_equal(a, b)


def test_saving_does_not_write_the_index(data):
    """A change whose cost grows with the size of the index."""
    _, r = make(data)
    before = (data / "kb.index" / "index.faiss").stat()
    r.add([20], ["Zubrowka"])
    r.save()
    after = (data / "kb.index" / "index.faiss").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert (data / "kb.index" / "changes.npz").stat().st_size < 5000


# -- Files, flags and places ------------------------------------------------------------------

BAD_JSON = ["", "[]", "null", '{"n": 13}', "{", "\x00\x01", '{"format": 3}', "[" * 100_000]


def test_damaged_index_files(data):
    """A KeyError, an EOFError or worse for a file that a crash or an editor has spoilt."""
    _, r = make(data)
    r.add([20], ["Zubrowka"])
    r.save()
    folder = data / "kb.index"
    meta = json.loads((folder / "meta.json").read_text())
    wrong = [dict(meta, **change) for change in (dict(n="13"), dict(blank=None), dict(dim=1.5))]
    wrong += [{k: v for k, v in meta.items() if k != key} for key in ("checksum", "factory")]
    bad = {
        "meta.json": [x.encode() for x in BAD_JSON] + [json.dumps(x).encode() for x in wrong],
        "embedder.npy": [b"", b"\x93NUMPY", array_bytes(np.zeros(3, "<u4")), b"PK\x03\x04"],
        "changes.npz": [b"", b"PK\x03\x04", (folder / "changes.npz").read_bytes()[:-99]],
        "index.faiss": [b"", b"IxFI", (folder / "index.faiss").read_bytes()[:-1]],
    }
    bad["embedder.npy"].append(array_bytes(np.zeros((2, 2))))
    bad["changes.npz"].append(array_bytes(np.zeros(3)))
    for name, contents in bad.items():
        good = (folder / name).read_bytes()
        for content in contents:
            (folder / name).write_bytes(content)
            with pytest.raises(UserError, match=f"{name}.*python retrieval.py index --data"):
                Retriever.open(folder)
        (folder / name).write_bytes(good)
    assert len(Retriever.open(folder)) == 14


def array_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_damaged_neighbours(data):
    """A sidecar that is believed, or a KeyError in the middle of a training."""
    references, r = make(data)
    tokens = corpus.open_tokens(data, "explicit")
    path = data / "explicit.neighbors.bin"
    retrieval.write_neighbors(path, tokens, 7, references, r, 2, context=35, progress=False)
    side = path.with_suffix(".json")
    good = side.read_text()
    meta = json.loads(good)
    wrong = [{k: v for k, v in meta.items() if k != key} for key in ("k", "context", "tokens")]
    wrong += [dict(meta, k=0), dict(meta, k="2"), dict(meta, context=-35), dict(meta, n_chunks=0)]
    for content in (*BAD_JSON, *map(json.dumps, wrong)):
        side.write_text(content)
        with pytest.raises(UserError, match="neighbors.json.*python retrieval.py neighbors --data"):
            open_neighbors(data, "explicit", chunk_len=7)
    side.write_text(good)
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole + whole[:8]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cut off"):
            open_neighbors(data, "explicit", chunk_len=7)


def test_neighbours_remember_the_window_of_the_filter(data):
    """Copies in memory: the training's windows reach beyond those that were searched for copies."""
    references, r = make(data)
    tokens = corpus.open_tokens(data, "explicit")
    path = data / "explicit.neighbors.bin"
    retrieval.write_neighbors(path, tokens, 7, references, r, 1, context=42, progress=False)
    for context in (42, 21, 14, 7):  # each lies within one that was searched
        assert open_neighbors(data, "explicit", chunk_len=7, context=context)[1] == "kb"
    for context in (84, 28, 35, 49):  # longer, or across two of them
        cure = f"--references kb --chunk_len 7 --context {context} --k 1 --threshold 0.9"
        with pytest.raises(UserError, match=f"windows of 42 tokens, not of {context}; .*{cure}"):
            open_neighbors(data, "explicit", chunk_len=7, context=context)


def test_cures_name_the_files_at_hand(data):
    """A cure with NAME or T in it, or with references that are not there."""
    corpus.References.create(data / "train_refs", [[75]], 257)
    for split, name in (("explicit", "train_refs"), ("explicit_val", "kb")):
        cure = f"--data {data} --split {split} --references {name} --chunk_len 7 --context 35"
        with pytest.raises(UserError, match=cure):
            open_neighbors(data, split, chunk_len=7, context=35)
    for name in ("kb.bin", "kb.idx"):
        (data / name).unlink()
    with pytest.raises(UserError, match="--references train_refs"):
        open_neighbors(data, "explicit_val")
    with pytest.raises(UserError, match=f"index --data {data} --references no"):
        Retriever.open(data / "no.index")


def test_neighbours_interrupted(data, monkeypatch):
    """Ctrl-C that does not say whether the work of hours is lost."""
    references, r = make(data)
    tokens = corpus.open_tokens(data, "explicit")
    real = neighbors

    def dying(*args, start, **options):
        if start == 6:
            raise KeyboardInterrupt
        return real(*args, start=start, **options)

    monkeypatch.setattr(retrieval, "neighbors", dying)
    line = f"after 6 of {len(tokens) // 7} chunks, which are kept: the same command goes on"
    with pytest.raises(KeyboardInterrupt, match=line):
        path = data / "explicit.neighbors.bin"
        retrieval.write_neighbors(
            path, tokens, 7, references, r, 2, context=35, batch=3, progress=False
        )


def test_flags_have_ranges(data, capsys):
    """A number that cannot be meant: a traceback, or the blame on another flag."""
    common = ["neighbors", "--data", str(data)]
    for flag in ("--k", "--chunk_len", "--context"):
        for value in ("0", "-1", "1.5", "x", ""):
            with pytest.raises(SystemExit):
                retrieval.main([*common, f"{flag}={value}"])
            refusal = capsys.readouterr().err
            assert f"argument {flag}: " in refusal
            assert "it goes from 1" in refusal or "invalid int value" in refusal
    for value in ("-0.1", "1.01", "nan", "inf", "x"):
        with pytest.raises(SystemExit):
            retrieval.main([*common, f"--threshold={value}"])
        refusal = capsys.readouterr().err
        assert "it goes from 0 to 1" in refusal or "invalid float value" in refusal
    for command in ("index", "join", "neighbors"):
        with pytest.raises(SystemExit):
            retrieval.main([command, "--help"])
        assert "(default: kb)" in capsys.readouterr().out


def test_a_data_directory_that_moves(data, monkeypatch):
    """An index that looks for its tokenizer where the data set was when it was made."""
    seen = []

    def tokenizer(name):
        seen.append(Path(name))
        return Bytes()

    monkeypatch.setattr(corpus, "tokenizer", tokenizer)
    make(data)
    moved = data.parent / "moved"
    data.rename(moved)
    seen.clear()
    r = Retriever.open(moved / "kb.index", references=corpus.References.open(moved / "kb"))
    assert seen == [moved] and r.search([text(4)], 1)[0].tolist() == [[4]]
