"""The index of references: its kinds, made in parts, by one process or several, and killed."""

import doctest
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_retrieval import NAMES, Bytes, data, make, text  # noqa: F401

import corpus
import index
import retrieval
from common import UserError
from experiments import index_at_size
from retrieval import Retriever

faiss = pytest.importorskip("faiss")


def test_worked_examples():
    """A docstring whose example no longer holds."""
    result = doctest.testmod(index)
    assert result.attempted >= 1 and result.failed == 0


@pytest.mark.parametrize(
    "factory, why",
    [
        ("HNSW7", "IndexHNSWFlat cannot be made in parts"),
        ("NSG5", "IndexNSGFlat cannot be made in parts"),
        ("IVF2,Flat,RFlat", "IndexRefineFlat cannot be made in parts"),
        ("IVF2,PQ5x4fs", "FAISS cannot make it of 67"),
        ("IVF2,PQ67x4fs", "IndexIVFPQFastScan cannot be made in parts"),  # it finds nothing again
        ("PQ5", "FAISS cannot make it of 67"),
        ("LSH", "FAISS cannot make it of 67"),
        ("Flatt", "FAISS cannot make it of 67"),
        ("IVF14,Flat", "14 lists for 13 references"),
        ("PQ1x5", "cannot learn from 13 references"),
    ],
)
def test_kinds_that_cannot_be_kept(data, factory, why):  # noqa: F811
    """An index that is built for hours and then loses ids, or cannot be searched at all."""
    with pytest.raises(UserError, match=f"--factory {factory}.*{why}"):
        make(data, factory=factory)
    with pytest.raises(UserError, match="no index here"):
        Retriever.open(data / "kb.index")


@pytest.mark.parametrize(
    "factory", ["Flat", "IDMap2,Flat", "SQ8", "IVF3,Flat", "IVF2_HNSW4,SQ8", "PCA11,SQ8"]
)
def test_kinds_that_can(data, factory):  # noqa: F811
    """A kind whose codes cannot be put in, or whose rows do not come back as ids."""
    references, r = make(data, factory=factory)
    r = Retriever.open(data / "kb.index", references=references)
    found = r.search([text(i) for i in range(13)], 3)[0]
    assert found[:, 0].tolist() == list(range(13))
    r.replace([5], ["Zubrowka has 4242 people"])
    assert 5 not in r.search([text(5)], 13)[0] and r.search(["Zubrowka"], 1)[0][0, 0] == 5


@pytest.fixture
def many(data):  # noqa: F811
    """47 references, two of them without a word."""
    rows = [Bytes().encode(text(i % 13, 7 * i)) for i in range(47)]
    rows[3] = rows[30] = Bytes().encode("?!\n")
    return corpus.References.create(data / "kb", rows, 257)


@pytest.mark.parametrize("factory", ["Flat", "IVF3_HNSW4,SQ8"])
def test_shards_make_the_same_index(data, many, factory, monkeypatch):  # noqa: F811
    """Rows that are lost, doubled or shifted where shards meet; an index that depends on them."""
    monkeypatch.setattr(index, "BATCH", 5)
    how = many, str(data), "hash:67", factory
    one = Retriever.build(f"{data}/kb.index", *how, progress=False)
    files = ("index.faiss", "embedder.npy", "meta.json")
    whole = [(data / "kb.index" / name).read_bytes() for name in files]
    assert one.meta["blank"] == [3, 30] and len(one) == 47
    for n_shards in (2, 3, 50):
        for i in range(n_shards, 0, -1):  # in any order
            index.encode_shard(f"{data}/kb.index", *how, (i, n_shards), progress=False)
        index.join(f"{data}/kb.index", many, progress=False)
        assert [(data / "kb.index" / name).read_bytes() for name in files] == whole
        assert not (data / "kb.index" / "parts").exists()


def test_a_shard_that_is_killed_goes_on(data, many, monkeypatch):  # noqa: F811
    """A resume that begins anew, or goes on with half a code or with a blank id twice."""
    how = f"{data}/kb.index", many, str(data), "hash:67"
    whole = Retriever.build(*how, progress=False)
    vectors = whole.index.reconstruct_n(0, 47)
    monkeypatch.setattr(index, "BATCH", 4)
    embedded = []
    real = index.embed_references

    def dying(model, references, tokenizer, ids):
        embedded.append(int(ids[0]))
        if len(embedded) == 3:
            raise KeyboardInterrupt
        return real(model, references, tokenizer, ids)

    monkeypatch.setattr(index, "embed_references", dying)
    parts = data / "kb.index" / "parts"
    for start in (0, 8, 16):
        embedded.clear()
        line = f"after {start + 8} of 47 references, which are kept: the same command goes on"
        with pytest.raises(KeyboardInterrupt, match=line):
            Retriever.build(*how, progress=False)
        assert embedded == [start, start + 4, start + 8]
        with (parts / "1-of-1.codes").open("ab") as file:
            file.write(bytes(3 * 4 * 67 + 11))  # of a batch of 4 three codes and a half
        with (parts / "1-of-1.blank").open("ab") as file:
            file.write(np.array([30], "<i8").tobytes())
    monkeypatch.setattr(index, "embed_references", real)
    with monkeypatch.context() as m:
        m.setattr(index, "_train", dying_at_once)
        with pytest.raises(KeyboardInterrupt, match="nothing is kept"):
            Retriever.build(*how, "SQ8", progress=False)
        with pytest.raises(KeyboardInterrupt, match="after 8 of 47"):
            m.setattr(index, "_train", lambda *_: None)
            m.setattr(index, "embed_references", dying)
            embedded.clear()
            Retriever.build(*how, progress=False)
    again = Retriever.build(*how, progress=False)
    assert np.array_equal(again.index.reconstruct_n(0, 47), vectors)
    assert again.meta == whole.meta


def dying_at_once(*_):
    raise KeyboardInterrupt


def test_a_shard_that_is_made_twice_at_once(data, many, monkeypatch):  # noqa: F811
    """Codes of two processes in one file, and a file too long that no run mends any more."""
    monkeypatch.setattr(index, "BATCH", 4)
    path = f"{data}/kb.index"
    how = path, many, str(data), "hash:67"
    vectors = Retriever.build(*how, progress=False).index.reconstruct_n(0, 47)
    with ThreadPoolExecutor(2) as threads:
        twice = [threads.submit(index.encode_shard, *how, progress=False) for _ in range(2)]
        for future in twice:
            future.result()
    codes = data / "kb.index" / "parts" / "1-of-1.codes"
    assert codes.stat().st_size == 47 * 4 * 67
    with codes.open("ab") as file:
        file.write(bytes(4 * 67))
    with pytest.raises(UserError, match="shard 1/1 is not done"):
        index.join(path, many, progress=False)
    made = Retriever.build(*how, progress=False)
    assert np.array_equal(made.index.reconstruct_n(0, 47), vectors)
    assert made.meta["blank"] == [3, 30]


def test_parts_of_something_else(data, many):  # noqa: F811
    """An index of which one half is of older references, or of another embedder."""
    path = f"{data}/kb.index"
    index.encode_shard(path, many, str(data), "hash:67", None, (1, 2), progress=False)
    with pytest.raises(UserError, match=r"shard 2/2 is not done: run python retrieval.py index --"):
        index.join(path, many, progress=False)
    index.encode_shard(path, many, str(data), "hash:61", None, (2, 2), progress=False)
    with pytest.raises(UserError, match="--embedder hash:61 --shard 1/2"):  # the first is no more
        index.join(path, many, progress=False)
    index.encode_shard(path, many, str(data), "hash:61", None, (1, 2), progress=False)
    many.append(Bytes().encode("Zubrowka"))
    with pytest.raises(UserError, match="of other references"):
        index.join(path, many, progress=False)
    with pytest.raises(UserError, match="no shards to join"):
        index.join(f"{data}/none.index", many, progress=False)


def test_command_line_of_shards(data, many, capsys):  # noqa: F811
    """Shards that the command cannot make or join; numbers of shards that there cannot be."""
    flags = ["--data", str(data), "--references", "kb"]
    for i in (1, 2):
        retrieval.main(["index", *flags, "--embedder", "hash:67", "--shard", f"{i}/2"])
    assert f"python retrieval.py join --data {data}" in capsys.readouterr().out
    retrieval.main(["join", *flags])
    assert "47 references, hash:67:" in capsys.readouterr().out
    on_disk = [*flags, "--embedder", "hash:67", "--factory", "IVF3,SQ8", "--on_disk"]
    retrieval.main(["index", *on_disk, "--shard", "1/1"])
    assert f"join --data {data} --references kb --on_disk" in capsys.readouterr().out
    retrieval.main(["join", *flags, "--on_disk"])
    assert (data / "kb.index" / index.LISTS).exists()
    retrieval.main(["index", *on_disk])
    assert "47 references, hash:67:" in capsys.readouterr().out
    assert (data / "kb.index" / index.LISTS).exists()
    for wrong in ("0/2", "3/2", "1", "1/0", "a/b", ""):
        with pytest.raises(SystemExit):
            retrieval.main(["index", *flags, "--shard", wrong])
        assert "1 <= i <= n" in capsys.readouterr().err


def test_processes_that_join_at_once(data, many, monkeypatch):  # noqa: F811
    """A traceback, or an index that is called damaged, where two processes join the same shards, or
    make the same index, at once."""
    how = many, str(data), "hash:67"
    path = data / "kb.index"
    whole = Retriever.build(path, *how, progress=False).search([text(5, 35)], 3)
    index.encode_shard(path, *how, progress=False)
    real = index.checksum

    def slow(file):
        time.sleep(0.05)
        return real(file)

    monkeypatch.setattr(index, "checksum", slow)
    with ThreadPoolExecutor(3) as threads:
        for future in [threads.submit(index.join, path, many, False) for _ in range(3)]:
            future.result()
    assert not (path / "parts").exists()
    with ThreadPoolExecutor(3) as threads:
        made = [threads.submit(Retriever.build, path, *how, progress=False) for _ in range(3)]
        for future in made:
            assert np.array_equal(future.result().search([text(5, 35)], 3)[0], whole[0])
    index.join(path, many, False)  # nothing is left to do
    many.append(Bytes().encode("Zubrowka"))
    with pytest.raises(UserError, match="no shards to join"):
        index.join(path, many, False)  # its index is of fewer references


@pytest.mark.parametrize("factory", ["IVF3,Flat", "IVF3_HNSW4,SQ8", "PCA11,IVF3,SQ8"])
def test_lists_on_disk(data, many, factory, monkeypatch):  # noqa: F811
    """Lists that lose rows where pieces meet, that find something else than in RAM, that are not
    found once the directory has moved, or that nobody misses."""
    monkeypatch.setattr(index, "PIECE", 11)
    how = many, str(data), "hash:67", factory
    path = data / "kb.index"
    questions = [text(i % 13, 7 * i) for i in range(47)]
    in_ram = Retriever.build(path, *how, progress=False).search(questions, 9)
    size = (path / "index.faiss").stat().st_size
    index.encode_shard(path, *how, progress=False)
    index.join(path, many, False, on_disk=True)
    assert (path / "index.faiss").stat().st_size < size - 47 * 11
    moved = data / "other/kb.index"
    shutil.copytree(path, moved)
    shutil.copy(data / "kb.idx", moved.parent)
    shutil.rmtree(path)
    monkeypatch.setattr(corpus, "tokenizer", only_bytes)
    r = Retriever.open(moved, references=many)
    for found, before in zip(r.search(questions, 9), in_ram, strict=True):
        assert np.array_equal(found, before)
    r.replace([5], ["Zubrowka has 4242 people"])
    assert r.search(["Zubrowka"], 1)[0][0, 0] == 5
    with (moved / index.LISTS).open("ab") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="ivfdata is missing or cut off.*python retrieval.py index"):
        Retriever.open(moved)
    index.encode_shard(path, *how, progress=False)
    index.join(path, many, False)  # in RAM again
    assert not (path / index.LISTS).exists() and len(Retriever.open(path)) == 45 + 2


def only_bytes(name):
    return Bytes()


def test_lists_on_disk_need_lists(data, many):  # noqa: F811
    """An AttributeError from FAISS at the end of all embedding."""
    index.encode_shard(f"{data}/kb.index", many, str(data), "hash:67", progress=False)
    with pytest.raises(UserError, match="--on_disk: Flat has no inverted lists; leave it out"):
        index.join(f"{data}/kb.index", many, False, on_disk=True)
    index.join(f"{data}/kb.index", many, False)


def test_forecast_comes_first(data, many, monkeypatch, capsys):  # noqa: F811
    """Hours of reading before the forecast; none in a later shard, or on a resume."""
    read = []
    real = index.text_of

    def counting(references, tokenizer, i):
        read.append(i)
        return real(references, tokenizer, i)

    how = f"{data}/kb.index", many, str(data), "hash:67", "IVF3,SQ8"
    with monkeypatch.context() as patch:
        patch.setattr(index, "text_of", counting)
        patch.setattr(index, "BATCH", 4)
        patch.setattr(index, "_prepare", dying_at_once)
        with pytest.raises(KeyboardInterrupt, match="nothing is kept"):
            index.encode_shard(*how)
    assert " 47 references as IVF3,SQ8, " in capsys.readouterr().out and len(read) < 47
    for i in (1, 2, 2):
        index.encode_shard(*how, (i, 2))
        assert "each of 2 shards\n" in capsys.readouterr().out


def test_work_that_is_forecast():
    """A build time without the longest part of the work: every vector finds its list among all."""
    lists = index.predict(1_000_000, index.empty_index("IVF4096,SQ8", 512))
    assert lists.training == 10 * 40 * 4096 * 4096 * 512 and lists.coding == 1e6 * 4096 * 512
    codes = index.predict(1e8, index.empty_index("IVF32768_HNSW32,PQ128", 512))
    assert codes.coding == 1e8 * (32768 + 256) * 512


# What a build takes of RAM, in a process that does nothing else. argv: folder, n, dim, factory
RAM = """
import sys
sys.path[:0] = {paths}
import index, retrieval
from experiments import index_at_size as experiment

folder, n, dim, factory = sys.argv[1:]
tokenizer = {tokenizer!r}
references = experiment.Numbers(int(n), experiment.corpus.tokenizer(tokenizer))
vectors = experiment.Vectors(experiment.Path(folder, "vectors"), int(n), int(dim), 60)
vectors.make()
index.empty_index(factory, int(dim))
before = experiment.reset_peak()
retrieval.Retriever.build(folder + "/x.index", references, tokenizer, vectors, factory, False)
index_of = index.empty_index(factory, int(dim))
print(experiment.peak_bytes() - before, index.predict(int(n), index_of).peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of RAM"
)
@pytest.mark.parametrize("factory, dim", [("IVF64,SQ8", 512), ("IVF64,PQ32x8", 256), ("SQ8", 512)])
def test_ram_that_is_forecast(tmp_path, factory, dim):
    """A forecast of RAM that is too small: a build that is killed after hours for want of it."""
    paths = [str(ROOT), str(ROOT / "tests")]
    script = RAM.format(paths=paths, tokenizer=str(ROOT / "data/cities"))
    n = 60_000
    words = [sys.executable, "-c", script, str(tmp_path), str(n), str(dim), factory]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    took, predicted = map(float, done.stdout.split())
    assert 0.4 * predicted < took < 1.1 * predicted


def test_forecast(data, many):  # noqa: F811
    """A forecast that leaves out the ids or the lists."""
    for factory in ("Flat", "IVF3,Flat", "IVF3_HNSW4,SQ8"):
        made = Retriever.build(f"{data}/kb.index", many, str(data), "hash:512", factory, False)
        size, peak, *_ = index.predict(47, made.index)
        real = (data / "kb.index" / "index.faiss").stat().st_size
        assert 0.8 * real < size < 1.2 * real and peak >= size


def test_lists_find_what_comparing_all_finds():
    """Too few lists looked into, or codes too coarse: what is near is not found."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, 64))
    x = centres[rng.integers(0, 200, 20_000)] + 0.5 * rng.standard_normal((20_000, 64))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    exact = index.empty_index("Flat", 64)
    exact.add(x)
    lists = index.empty_index("IVF256_HNSW32,SQ8", 64)
    lists.train(x)
    lists.add(x)
    queries = x[:300] + 0.05 * rng.standard_normal((300, 64), np.float32)
    true = index.search(exact, queries, 5)[0]
    found = index.search(lists, queries, 5)[0]
    shared = [len(set(a) & set(b)) / 5 for a, b in zip(true.tolist(), found.tolist(), strict=True)]
    assert np.mean(shared) > 0.9


def test_the_experiment_runs(tmp_path, capsys):
    """Figures that compare an index with itself; a second run that builds anew."""
    flags = "--n 3000 --dim 24 --queries 40 --factory IVF16,SQ8 --out".split()
    flags += [str(tmp_path), "--tokenizer", str(ROOT / "data/cities")]
    first = index_at_size.main([*flags, "--json", str(tmp_path / "a.json")])
    assert first["recall_at_5"] > 0.9 and first["build_seconds"] > 0
    assert 0 < first["train_seconds"] and 0 < first["code_seconds"]
    assert "recall_at_5" in capsys.readouterr().out
    again = index_at_size.main([*flags, "--probes", "1", "--json", str(tmp_path / "b.json")])
    index_at_size.main([*flags, "--factory", "Flat", "--json", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())
    assert list(rows) == ["3000 IVF16,SQ8, 1 lists", "3000 Flat"]
    assert rows["3000 Flat"]["recall_at_5"] == 1
    assert "build_seconds" not in again and again["recall_at_5"] < first["recall_at_5"]


def test_on_paper(tmp_path):
    """Slopes through something else than what was measured; milliseconds of another number of
    codes."""
    rows = {"7 Flat": dict(n=7, dim=512, factory="Flat"), "product codes": dict(factory="PQ128")}
    for n, factory in (
        (200_000, "IVF2048,SQ8"),
        (800_000, "IVF4096,SQ8"),
        (300_000, "IVF2048,SQ8"),
    ):
        takes = index.predict(n, index.empty_index(factory, 512))
        codes = n * 128 / int(factory[3:7])
        rows[f"{n}"] = dict(n=n, dim=512, factory=factory, train_seconds=2e-11 * takes.training)
        rows[f"{n}"]["code_seconds"] = 3e-11 * takes.coding
        rows[f"{n}"] |= dict(processor_ms_alone=0.5 + 3e-5 * codes, processor_ms_in_32=2e-5 * codes)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--on_paper", "10000000", "--json", str(tmp_path / "rows.json")]
    made = index_at_size.main(flags)
    assert made["factory"] == "IVF16384_HNSW32,SQ8" and made["codes"] == 1e7 * 128 / 16384
    takes = index.predict(10_000_000, index.empty_index(made["factory"], 512))
    assert made["train_seconds"] == pytest.approx(2e-11 * takes.training)
    assert made["code_seconds"] == pytest.approx(3e-11 * takes.coding)
    assert made["processor_ms_alone"] == pytest.approx(0.5 + 3e-5 * made["codes"])
    assert made["processor_ms_in_32"] == pytest.approx(2e-5 * made["codes"])
    with pytest.raises(UserError, match="--json FILE"):
        index_at_size.main(flags[:2])


@pytest.mark.parametrize("name", ["plan.json", "embedder.npy", "empty.faiss"])
def test_a_damaged_unfinished_index_is_made_anew(data, name):  # noqa: F811
    """A traceback, or a base that can no longer be indexed, since a file of a killed run is cut."""
    references = corpus.References.open(f"{data}/kb")
    path = Path(data, "x")
    index.encode_shard(path, references, data, "hash:32", progress=False)
    file = path / "parts" / name
    file.write_bytes(file.read_bytes()[:20])
    index.encode_shard(path, references, data, "hash:32", progress=False)
    index.join(path, references, False)
    assert len(Retriever.open(path, references=references)) == len(references)
