"""Whole documents (Remark 3.2) in the bank, write.py and the experiment. (Writing itself: see
test_model.py.) Odd sizes."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, SHAPE
from world import World

import corpus
import inside
import kb
import write
from bank import MemoryBank
from common import UserError, write_json
from experiments import whole_documents
from model import Config, Memory3, load_checkpoint
from retrieval import Live

V = 37
PIECES = [1, 7, 2, 3]  # of each document; with half = 2, 7 pieces are three windows
N = sum(PIECES)
CONFIG = dict(SHAPE, vocab_size=V, memory_tokens=5, ref_len=13, max_context=59, header=(1, 2, 3))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = Memory3(Config(**CONFIG))
    for p in model.parameters():
        p.data *= 4 if p.dim() == 2 else 1
    return model.eval()


def references(folder, documents=PIECES):
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, V, n).tolist() for n in rng.integers(1, 14, N)]
    folder.mkdir(exist_ok=True)
    write_json(folder / "meta.json", dict(n_vocab=V))
    return corpus.References.create(folder / "kb", rows, V, documents)


@pytest.fixture(scope="module")
def written(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("whole")
    refs = references(folder / "data")
    bank = MemoryBank.create(folder / "kb", model, refs, "float32", whole_documents=True)
    assert bank.write(batch=3, progress=False) == N
    return bank.path


@pytest.fixture
def bank(tmp_path, written, model):
    shutil.copytree(written, tmp_path / "kb")
    return MemoryBank.open(tmp_path / "kb", model)


# Reference i is encoded after these: documents begin at 0, 1, 8, 10; windows of the second
# document are rows 1-4, 3-6, 5-7.
BEFORE = {0: [], 1: [], 2: [1], 3: [1, 2], 4: [1, 2, 3], 5: [3, 4], 6: [3, 4, 5], 7: [5, 6]}
BEFORE |= {8: [], 9: [8], 10: [], 11: [10], 12: [10, 11]}


def made(model, texts, i, skip=()):
    """What the model writes for reference i of a base after those that stand before it."""
    ids = [*[j for j in BEFORE[i] if j not in skip], i]
    with torch.inference_mode():
        return model.write(texts.batch(ids), documents=torch.zeros(len(ids), dtype=int))[-1:]


def same(pool, wanted):
    return torch.allclose(pool.kv, wanted.kv, rtol=1e-4, atol=1e-5)


def test_the_bank_writes_pieces_in_their_document(bank, model):
    """Pieces written alone, after the wrong pieces, or in the row of another; long documents that
    begin afresh in the middle; a cold start that differs from a warm one."""
    pool = bank.recall(list(range(N)))
    for i in range(N):
        assert same(pool[i : i + 1], made(model, bank.references, i))
    alone = model.write(bank.references.batch(range(N)))
    differs = (alone.kv - pool.kv).abs().amax((1, 2, 3, 4, 5)) > 0.01
    assert differs.tolist() == [len(BEFORE[i]) > 0 for i in range(N)]
    assert pool.count.tolist() == alone.count.tolist()
    (bank.path / "memories.bin").unlink()
    cold = MemoryBank.open(bank.path, model).recall([12, 5, 0])
    for row, i in enumerate([12, 5, 0]):
        assert same(cold[row : row + 1], made(model, bank.references, i))


def test_another_text_makes_the_pieces_after_it_missing(bank, model):
    """Memories that still tell of a text that is gone, out of the file or out of the cache; pieces
    of other documents that are written again for nothing; a place lost in replacing."""
    bank.recall(list(range(N)))  # all are in the cache
    bank.delete(4)  # told again, it is where it was
    bank.replace(4, [7, 8, 9])
    assert bank.verify() == [5, 6]
    pool = bank.recall(list(range(N)))
    for i in range(N):
        assert same(pool[i : i + 1], made(model, bank.references, i))
    assert bank.verify() == []
    other = MemoryBank.open(bank.path, model)
    other.references.replace(10, [3, 4])  # not through the bank: nothing is erased
    assert bank.verify() == [10, 11, 12]
    assert same(bank.recall([12]), made(model, bank.references, 12))


def test_what_is_deleted_leaves_the_pieces_after_it(bank, model):
    """Deleted facts that live on in the memories of their document, in the file or in RAM."""
    before = bank.recall([3, 4, 5])
    old = before.kv.clone()
    stride = bank.memories.stride
    bank.delete([2])
    data = (bank.path / "memories.bin").read_bytes()
    for i in (2, 3, 4):
        assert not any(data[i * stride : (i + 1) * stride])
    assert any(data[5 * stride : 6 * stride])
    assert bank.verify() == [3, 4]
    pool = bank.recall([3, 4, 5])
    for row, i in enumerate([3, 4, 5]):
        assert same(pool[row : row + 1], made(model, bank.references, i, skip=[2]))
    assert (pool.kv[0] - old[0]).abs().max() > 0.001


def test_what_is_added_later_stands_alone(bank, model):
    """A new text that is taken for a piece of the last document, whatever its source says."""
    i = bank.append([5, 6, 7, 8], dict(piece=2))
    assert same(bank.recall([i]), model.write(torch.tensor([[5, 6, 7, 8]])))
    assert bank.verify() == []


def test_alone_and_whole_are_two_bases(tmp_path, written, model):
    """One kind of memories taken for the other."""
    refs = references(tmp_path / "data")
    with pytest.raises(UserError, match="is of whole documents: add --whole_documents"):
        MemoryBank.create(written, model, refs, "float32")
    alone = MemoryBank.create(tmp_path / "alone", model, refs, "float32")
    with pytest.raises(UserError, match="references that are encoded alone"):
        MemoryBank.create(tmp_path / "alone", model, refs, "float32", whole_documents=True)
    shutil.copy(written / "memories.bin", alone.path)
    assert MemoryBank.open(alone.path, model).verify() == list(range(N))
    other = MemoryBank.open(written).references
    again = MemoryBank.create(tmp_path / "again", model, other, "float32", whole_documents=True)
    assert same(again.recall([6]), made(model, refs, 6))


def test_data_that_knows_no_documents_is_refused(tmp_path, model):
    """References that are all taken for documents of one, and counts of another file."""
    refs = references(tmp_path / "data", None)
    with pytest.raises(UserError, match="kb.documents is missing"):
        MemoryBank.create(tmp_path / "kb", model, refs, whole_documents=True)
    refs = references(tmp_path / "data", [N - 1, 2])
    with pytest.raises(UserError, match="kb.documents does not fit"):
        MemoryBank.create(tmp_path / "kb", model, refs, whole_documents=True)
    places = [place for n in PIECES for place in range(n)]
    assert references(tmp_path / "data").places().tolist() == places


def test_quantized_memories_of_whole_documents(bank, model):
    """Codes that are never taken for whole, or not missing when a piece before them changes."""
    codes = bank.quantize("Residual2x6,PQ5x6", progress=False)
    assert codes.verify() == []
    codes.replace(8, [1, 2, 3])
    assert codes.verify() == [9]


# -- Entry points


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    tok = corpus.tokenizer(ROOT / "data/cities")
    return World(tmp_path_factory.mktemp("world") / "world", tok)


def test_write_py(world, tmp_path, capsys):
    """The flag accepted and dropped; a base of the other kind opened with it."""
    texts = [world.tok.encode(text) for text in ("Abaholm is small.", " It is old.", "Corholm.")]
    corpus.References.create(world.data / "pieces", texts, world.tok.n_vocab, [2, 1])
    flags = dict(checkpoint=world.checkpoint, data=world.data, device="cpu")
    argv = [str(x) for k, v in flags.items() for x in (f"--{k}", v)]

    def command(out, *more):
        return write.main(write.command_line([*argv, "--out", str(tmp_path / out), *more]))

    alone = command("alone", "--references", "pieces").recall([0, 1, 2]).kv.clone()
    whole = command("whole", "--references", "pieces", "--whole_documents").recall([0, 1, 2]).kv
    assert torch.equal(alone[[0, 2]], whole[[0, 2]]) and not torch.equal(alone[1], whole[1])
    assert "references are encoded as one sequence" in capsys.readouterr().out
    with pytest.raises(UserError, match="encoded alone"):
        command("alone", "--whole_documents")
    # keys of these memories, which a changed piece leaves in those after it (Remark 3.1)
    flags = ["--kb", tmp_path / "whole", "--checkpoint", world.checkpoint, "--device", "cpu"]
    kb.main([*map(str, ["index", *flags, "--embedder", "self:1.1"])])
    bank = MemoryBank.open(tmp_path / "whole", load_checkpoint(world.checkpoint)[0].eval())
    bank.append(world.tok.encode("Dunholm."))
    assert len(Live.open(bank.references, bank.model)) == 4
    bank.replace(0, world.tok.encode("Abaholm is large."))
    with pytest.raises(
        UserError, match="keys of reference 0, a piece of a document, .* kb.py index"
    ):
        Live.open(bank.references, bank.model)
    kb.main([*map(str, ["index", *flags])])
    live = Live.open(bank.references, bank.model)
    assert live.embedder.name == "self:1.1"
    keys = live.retriever
    for i, kept in enumerate(inside.stored_keys(bank.recall(range(4)), keys.i, keys.head)):
        first, n = keys.rows[i]
        made = keys.index.reconstruct_n(first, n)
        assert n == len(kept) and (made * kept).sum(1).min() > 0.999
    with pytest.raises(UserError, match="kb.documents is missing"):
        command("none", "--references", "kb", "--whole_documents")


def test_the_experiment(world, tmp_path):
    """Places that were trained on among those judged, another way of writing than named, a pool
    without the right memory, tokens of the question judged."""
    tok = world.tok
    places = whole_documents.make_places(40, seed=3)
    assert len({place["name"] for place in places}) == 40
    assert places[:7] == whole_documents.make_places(7, seed=3)
    rng = random.Random(5)
    questions = whole_documents.ask(places[:7], rng, tok)
    for row, value, place in zip(questions.tokens, questions.value, places, strict=False):
        assert tok.decode(row[~value][: int((~value).sum())].tolist()).count(place["name"]) == 2
        said = tok.decode(row[value].tolist())
        assert any(place[name] in said for name in whole_documents.ASKED)
        assert said in whole_documents.second_piece(place)
    table = whole_documents.pool_table(7, 5, rng)
    for i, row in enumerate(table.tolist()):
        assert i in row and len(set(row)) == 5
    model = world.model
    alone = whole_documents.write_second(model, tok, places[:3], "alone")
    whole = whole_documents.write_second(model, tok, places[:3], "in document")
    assert len(alone) == len(whole) == 3 and not torch.equal(alone.kv, whole.kv)
    world.save(tmp_path / "model.pt", seed=2, ref_len=53)
    flags = dict(checkpoint=tmp_path / "model.pt", data=world.data, device="cpu", steps=2, batch=6)
    flags |= dict(places=11, questions=12, json=tmp_path / "whole.json")
    result = whole_documents.main([str(x) for k, v in flags.items() for x in (f"--{k}", v)])
    assert len(result["rows"]) == 6 and result["bytes"] == 2 * 2 * 2 * 2 * 5 * 12
    for row in result["rows"].values():
        assert set(row) == {"right piece", "among five"} and row["among five"]["nats"] > 0


def test_the_evidence_is_the_measured_one():
    """A table edited by hand, or older than the result beside it."""
    result = json.loads((ROOT / "experiments/results/whole_documents.json").read_text())
    page = (ROOT / "experiments/README.md").read_text()
    table = whole_documents.table(result)
    assert f"<!-- whole -->\n{table}\n<!-- /whole -->" in page
