"""Retrieval from inside (Remark 3.1): keys as memories hold them, queries as contexts ask them."""

import json

import numpy as np
import pytest
import torch

import corpus
import inside
import retrieval
from common import UserError
from experiments import inside as table
from inside import KeyRetriever, parse_head, query_vectors, stored_keys, written_keys
from memory import causal_attention, keep_tokens
from model import apply_rope, rope_table
from retrieval import Retriever

pytest.importorskip("faiss")


class Letters:
    """A tokenizer of lower-case letters, for the tiny model: a = 3, b = 4, ...; BOS 96."""

    bos, n_vocab, id, name = 96, 97, "letters:1", "letters"

    def encode(self, text):
        return [ord(letter) - 94 for letter in text if "a" <= letter <= "z"]

    def decode(self, ids):
        return "".join(chr(int(t) + 94) for t in ids if 3 <= t < 29)


TEXTS = ["kyivpeople", "lvivtime", "odesasea", "x", "turku", "oulunorthsea", "espoo", "lahtihill"]


@pytest.fixture
def world(build, tmp_path, monkeypatch):
    """A tiny model in float32, and 8 references of it."""
    monkeypatch.setattr(corpus, "tokenizer", lambda name: Letters())
    rows = [Letters().encode(text) for text in TEXTS]
    references = corpus.References.create(tmp_path / "kb", rows, 97)
    return build(dtype=torch.float32), references, tmp_path


def make(world, name="self:1.1", **options):
    model, references, path = world
    return KeyRetriever.build(
        path / "kb.index", references, str(path), name, model, progress=False, **options
    )


def alone(model, text, layer, head):
    """query_vectors of one text, step by step and without padding."""
    cfg = model.config
    tokens = torch.tensor([[*cfg.header, cfg.header[0], *text]])
    at = torch.tensor([*range(3), *range(3 + cfg.ref_len, 4 + cfg.ref_len + len(text))])
    cos, sin = rope_table(at, cfg)
    x = model.embed(tokens)
    for l in range(layer):
        q, k, v = model.blocks[l].begin(x, cos, sin)
        x = model.blocks[l].finish(x, causal_attention(q, k, v))
    q, k, _ = model.blocks[layer].begin(x)
    mask = torch.ones(1, len(text), dtype=torch.bool)
    chosen = keep_tokens(q[:, :, 4:], k[:, :, 4:], mask, cfg.memory_tokens)[0, head]
    q = apply_rope(q, cos, sin)[0, 3 * head : 3 * head + 3, 4:]
    q = q[:, chosen[chosen >= 0]].flatten(0, 1)
    return torch.nn.functional.normalize(q, dim=-1).detach().numpy()


@torch.no_grad()
def test_queries_are_those_of_a_context(build):
    """Queries of another layer, head or position; of the BOS or of padding; a text whose queries
    depend on what it is batched with."""
    model = build(dtype=torch.float32, memory_from=1)
    texts = [Letters().encode(text) for text in TEXTS] + [[]]
    for layer, head in ((1, 0), (2, 1), (3, 1)):
        found = query_vectors(model, texts, layer - 1, head)
        assert [len(x) for x in found] == [3 * min(5, len(text)) for text in texts]
        for text, x in zip(texts[:-1], found, strict=False):
            assert np.allclose(x, alone(model, text, layer, head), atol=1e-5)


def test_keys_are_those_of_the_memories(world):
    """Keys before RoPE, values for keys, or empty slots that are searched."""
    model, references, _ = world
    memories = model.write(references.batch(range(8)))
    for i, head in ((0, 0), (2, 1)):
        keys = written_keys(model, list(references), i, head)
        stored = stored_keys(memories, i, head)
        assert [len(x) for x in keys] == [min(5, len(text)) for text in TEXTS]
        for j, x in enumerate(keys):
            own = memories.kv[j, i, 0, head, : len(x)].detach().numpy()
            assert np.allclose(x, own / np.linalg.norm(own, axis=1, keepdims=True), atol=1e-6)
            assert np.allclose(x, stored[j].astype(np.float32), atol=1e-6)


def brute(model, references, queries, i, head):
    """(queries, references): the mean of the best cosines."""
    keys = written_keys(model, references, i, head)
    scores = []
    for q in query_vectors(model, queries, i, head):
        scores.append([(q @ k.T).max(1).mean() for k in keys])
    return np.array(scores)


def test_search_is_maxsim(world, monkeypatch):
    """Candidates scored by a part of their keys, or by those of a neighbour."""
    model, references, _ = world
    for name, (i, head) in {"self:1.1": (1, 1), "self:0.0": (0, 0)}.items():
        r = make(world, name)
        queries = [Letters().encode(x) for x in ("kyiv", "seaside", "turku", "people in lahti")]
        scores = brute(model, list(references), queries, i, head)
        ids, found = r.search(queries, 8)
        for row, all_scores in zip(range(4), scores, strict=True):
            order = [j for j in np.argsort(-all_scores, kind="stable") if all_scores[j] > 0]
            assert ids[row, : len(order)].tolist() == order
            assert np.allclose(found[row, : len(order)], all_scores[order], atol=1e-5)
            assert (ids[row, len(order) :] == -1).all() and (found[row, len(order) :] == -1).all()
    again, _ = r.search(["kyiv", "seaside", "turku", "people in lahti"], 8)
    assert np.array_equal(again, ids)
    padded = torch.full((1, 9), -1)
    padded[0, :5] = torch.tensor([96, *queries[0]])  # with BOS and padding
    assert np.array_equal(r.search(padded, 8)[0], ids[:1])


def test_nothing_asked_nothing_found(world):
    """A query without tokens, an index of nothing, or more references than there are."""
    r = make(world)
    ids, scores = r.search(["", "kyiv", "123"], 11)
    assert (ids[[0, 2]] == -1).all() and (scores[[0, 2]] == -1).all()
    assert ids.shape == (3, 11) and (ids[1] >= 0).any() and (ids[1, 8:] == -1).all()
    r.remove(range(8))
    assert len(r) == 0 and (r.search(["kyiv"], 2)[0] == -1).all()
    with pytest.raises(UserError, match="0 references asked for"):
        r.search(["kyiv"], 0)


def test_changes_and_the_disk(world):
    """A change that is lost, or a text that outlives it; another index that comes back."""
    model, references, path = world
    r = make(world)
    r.add([21], ["zubrowka"])
    r.replace([2], ["gotham"])
    r.remove([0])
    ids, scores = r.search(["zubrowka", "gotham", "kyivpeople"], 4)
    assert 0 not in ids and len(r) == 8
    expected = brute(model, [Letters().encode("zubrowka")], [Letters().encode("zubrowka")], 1, 1)
    assert scores[0][ids[0].tolist().index(21)] == pytest.approx(expected[0, 0], abs=1e-5)
    r.save(references)
    again = Retriever.open(path / "kb.index", references=references, model=model)
    assert isinstance(again, KeyRetriever) and len(again) == 8
    for a, b in zip(
        again.search(["zubrowka", "gotham", "kyivpeople"], 4), (ids, scores), strict=True
    ):
        assert np.array_equal(a, b)
    for wrong in (lambda: r.add([21], ["x"]), lambda: r.remove([0]), lambda: r.add([5], [])):
        with pytest.raises(UserError):
            wrong()


def test_another_models_keys_are_refused(world, build):
    """Keys of one model searched by the queries of another (Remark A.1)."""
    model, references, path = world
    make(world)
    with pytest.raises(UserError, match="give --checkpoint"):
        Retriever.open(path / "kb.index")
    other = build(dtype=torch.float32, seed=4)
    with pytest.raises(UserError, match="keys of self:1.1:.*--embedder self:1.1"):
        Retriever.open(path / "kb.index", model=other)
    references.append([7, 8])
    with pytest.raises(UserError, match="stale"):
        Retriever.open(path / "kb.index", model=model, references=references)
    meta = json.loads((path / "kb.index" / "meta.json").read_text())
    for content in (
        {},
        dict(meta, checksum="x"),
        {k: v for k, v in meta.items() if k != "checksum"},
    ):
        (path / "kb.index" / "meta.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"meta.json.*python retrieval.py index"):
            Retriever.open(path / "kb.index", model=model)


def test_heads_are_checked(world, build):
    """A head that is not there, or that keeps no memories."""
    config = build(memory_from=1).config
    assert parse_head("self:3.1", config) == (2, 1)
    for name, why in {
        "self:0.0": "layers 1 to 3",
        "self:4.0": "layers 1 to 3",
        "self:2.2": "heads 0 to 1",
        "self:2": "give self:LAYER.HEAD",
        "self:-1.0": "give self:LAYER.HEAD",
    }.items():
        with pytest.raises(UserError, match=why):
            parse_head(name, config)
    config = build(memory_heads="0.1,2.0").config
    assert parse_head("self:2.0", config) == (2, 0)
    with pytest.raises(UserError, match="keeps no memories there"):
        parse_head("self:2.1", config)


def test_command_line(world, monkeypatch, capsys):
    """A command that makes another index than it was asked for, or swallows a flag."""
    model, _, path = world
    (path / "meta.json").write_text(json.dumps(dict(n_vocab=97)))
    monkeypatch.setattr(retrieval, "load_checkpoint", lambda path: (model, {}))
    flags = ["index", "--data", str(path), "--embedder", "self:2.0"]
    retrieval.main(flags)
    assert "8 references, self:2.0:" in capsys.readouterr().out
    assert Retriever.open(path / "kb.index", model=model).search(["turku"], 1)[0].shape == (1, 1)
    corpus.write_tokens(path / "said.bin", Letters().encode("kyivpeople turku lahti") * 3, 97)
    said = ["--split", "said", "--chunk_len", "5", "--context", "10", "--threshold", "1"]
    retrieval.main(["neighbors", "--data", str(path), *said])
    rows, name = retrieval.open_neighbors(path, "said", chunk_len=5)
    assert name == "kb" and rows.shape == (12, 1) and (rows >= 0).any()
    with pytest.raises(UserError, match="not with --embedder self:"):
        retrieval.main([*flags, "--shard", "1/2"])
    assert inside.FORMAT in (path / "kb.index" / "meta.json").read_text()


def test_the_experiment_finds_what_search_finds(world, monkeypatch, capsys):
    """A table whose rows are other heads than they say, or whose half is not the half."""
    model, references, path = world
    rows = []
    for i, text in enumerate(TEXTS):
        rows.append(dict(question=f"where is {text}", answer="x", reference=i, sentences=[]))
    (path / "meta.json").write_text(json.dumps(dict(n_vocab=97)))
    (path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(table, "open_model", lambda *_, **__: (model, Letters()))
    result = table.main(["--data", str(path), "--json", str(path / "table.json")])
    heads = [f"self:{layer}.{head}" for layer in range(3) for head in range(2)]
    assert list(result) == ["hash", *heads]
    for name in heads:
        ids = make(world, name).search([row["question"] for row in rows], 5)[0]
        hits = [i in ids[i] for i in range(8)]
        assert result[name]["recall_at_5"] == np.mean(hits)
    assert json.loads((path / "table.json").read_text()) == result
    assert "| self:2.1 |" in capsys.readouterr().out
    assert table.shared_words("is Zhmerynka big", "Zhmerynka is a town") == 0.5
