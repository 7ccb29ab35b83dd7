"""experiments/text.py and leak.py: what each condition reads, what the filter takes away."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from world import PLACES, World, text_of

import corpus
import eval as evaluation
from bank import MemoryBank
from common import UserError
from experiments import leak as leaking
from experiments import text
from experiments.leak import leak
from experiments.text import in_context, open_text, text_losses
from memory import Memories
from retrieval import Retriever, neighbors, overlap, write_neighbors
from train import recall_table

# tokens of a window and of a chunk, windows
T = 48
C = 16
N = 7


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The 17 places of test_sample.py, and a text that states them, some of it word by word."""
    tok = corpus.tokenizer(evaluation.__file__.removesuffix("eval.py") + "data/cities")
    w = World(tmp_path_factory.mktemp("text") / "world", tok)
    rng = np.random.default_rng(3)
    tokens = []
    while len(tokens) < T * N + 5:
        sentences = text_of(int(rng.integers(len(PLACES)))).split(". ")
        tokens += tok.encode(". ".join(sentences[: 1 + len(tokens) % 3]))
    corpus.write_tokens(w.data / "said.bin", tokens[: T * N + 5], tok.n_vocab)
    references = corpus.References.open(f"{w.data}/kb")
    retriever = Retriever.open(f"{w.data}/kb.index")
    write_neighbors(
        w.data / "said.neighbors.bin",
        corpus.open_tokens(w.data, "said"),
        C,
        references,
        retriever,
        1,
        context=T,
        progress=False,
    )
    w.open()[1].quantize(progress=False)
    return w


@pytest.fixture
def opened(world):
    a = SimpleNamespace(data=str(world.data), split="said", context=T, windows=64)
    windows, n = open_text(a, world.model.config)
    assert n == N
    return windows, n


def by_hand(world, windows, i, plain=False, ids=None):
    """The loss of window i, without Windows.batch: from the split and the references ids."""
    tokens = torch.from_numpy(np.array(windows.tokens[i * T : (i + 1) * T]).astype(np.int64))[None]
    targets = torch.cat([tokens[:, 1:], torch.tensor([[-1]])], 1)
    tokens[0, 0] = world.tok.bos
    if plain:
        return world.model(tokens, targets)[1].item()
    pool = Memories.empty(world.model.config)
    table = None
    if ids is not None:
        rows = windows.references.batch(np.maximum(ids, 0))
        pool = world.model.write(rows)
        table = recall_table(ids[None], 3)
    return world.model(tokens, targets, pool, table)[1].item()


def test_text_losses_are_those_of_the_windows(world, opened):
    """A mean over unequal batches, a condition that reads another's memories, the last window
    left out, random memories that are the recalled ones."""
    windows, n = opened
    conditions = ["plain", "none", "random", "recalled", "quantized", "rag"]
    codec = MemoryBank.open(world.bank, world.model, codes=True).codec
    losses = text_losses(world.model, windows, n, conditions, codec, batch=3)
    ids = windows.neighbors[: n * 3, 0].reshape(n, 3)
    for name, kind in (("plain", dict(plain=True)), ("none", {})):
        want = np.mean([by_hand(world, windows, i, **kind) for i in range(n)])
        assert losses[name] == pytest.approx(want, abs=1e-4)
    want = np.mean([by_hand(world, windows, i, ids=ids[i]) for i in range(n)])
    assert losses["recalled"] == pytest.approx(want, abs=1e-4)
    assert abs(losses["none"] - want) > 0.01
    gap = {c: abs(losses[c] - losses["recalled"]) for c in conditions}
    assert 0 < gap["quantized"] < gap["random"] and gap["rag"] > 0
    assert len(set(losses.values())) == 6 and all(map(math.isfinite, losses.values()))


def test_rag_on_text_scores_each_token_once(world, opened):
    """A token scored twice or never, by the references of the chunk before; a context beyond
    max_context; the window's own past cut at its near end."""
    windows, _ = opened
    tokens, targets, references, recall = windows.batch([2, 5])
    config = world.model.config
    pairs = in_context(config, tokens, references, recall)
    assert len(pairs) == 2 * 3
    for b in range(2):
        said = [t for _, after in pairs[3 * b : 3 * b + 3] for t in after]
        assert said == tokens[b, 1:].tolist() == targets[b, :-1].tolist()
    before, after = pairs[3 + 1]  # of the second window chunk 1
    rows = [j for j in recall[1, 1].tolist() if j >= 0]
    assert len(rows) == 2
    texts = [t for j in rows for t in references[j].tolist() if t >= 0]
    assert before == [world.tok.bos, *texts, *tokens[1, 1:17].tolist()]
    assert after == tokens[1, 17:33].tolist()
    short = type(config)(**{**vars(config), "max_context": len(texts) + 16 + 5})
    cut = in_context(short, tokens, references, recall)[4][0]
    assert cut == [world.tok.bos, *texts, *tokens[1, 12:17].tolist()]


def test_leak_filters_what_overlaps(world, opened, monkeypatch):
    """A threshold that is not heard, a filtered neighbour that is read all the same, the gain of
    one query_shift in the column of the other."""
    windows, n = opened
    retriever = Retriever.open(f"{world.data}/kb.index")
    read = []

    def losses(model, windows, n, conditions):
        read.append((conditions, windows.shift, windows.neighbors[: n * 3, 0].copy()))
        return {conditions[0]: 9.0 - len(read)}

    monkeypatch.setattr(leaking, "text_losses", losses)
    rows = leak(world.model, windows, retriever, n, thresholds=(None, 0.9, 0.5))
    assert [(c, s) for c, s, _ in read] == [(["none"], 0), *[(["recalled"], s) for s in (0, 1)] * 3]
    for k, (limit, row) in enumerate(zip((1.0, 0.9, 0.5), rows, strict=True)):
        ids = read[1 + 2 * k][2]
        assert (ids == read[2 + 2 * k][2]).all()
        for chunk, i in enumerate(ids):
            window = windows.tokens[chunk // 3 * T : (chunk // 3 + 1) * T]
            assert i < 0 or overlap(window, windows.references[int(i)]) <= limit
        assert row["changed"] == (ids != read[1][2]).mean() and row["empty"] == (ids < 0).mean()
        assert row["gain"] == [1.0 + 2 * k, 2.0 + 2 * k]
    assert rows[0]["changed"] == 0 < rows[2]["changed"]
    best = neighbors(windows.tokens[: n * T], C, windows.references, retriever, 1, threshold=1.0)
    assert (best[:, 0] == read[1][2]).all()


def args(world, *more):
    flags = dict(checkpoint=world.checkpoint, data=world.data, device="cpu", split="said")
    flags["context"] = T
    return [*(str(x) for k, v in flags.items() for x in (f"--{k}", v)), *map(str, more)]


def test_main_text_and_leak(world, tmp_path, capsys):
    """A table without a condition, or one that says "quantized" and has no codes; --n_recall that
    is not heard; a flag of another command that is accepted and dropped."""
    path = tmp_path / "new/text.json"
    result = text.main(args(world, "--bank", world.bank, "--json", path))
    assert json.loads(path.read_text()) == result
    assert set(result["losses"]) == set(evaluation.CONDITIONS) - {"oracle"}
    out = capsys.readouterr().out
    assert "| recalled: by chunks c-2..c, as in training |" in out and "not applicable" in out
    fewer = text.main(args(world, "--bank", "nowhere", "--n_recall", "1"))
    assert "quantized memories: left out, for nowhere" in capsys.readouterr().out
    assert "quantized" not in fewer["losses"]
    assert fewer["losses"]["recalled"] != result["losses"]["recalled"]
    assert fewer["losses"]["plain"] == pytest.approx(result["losses"]["plain"])
    result = leaking.main(args(world, "--windows", 3))
    assert [row["threshold"] for row in result["leak"]] == [None, 0.9, 0.8, 2 / 3]
    assert result["windows"] == 3 and "| no filter | 0.000 |" in capsys.readouterr().out
    for wrong in (["--shots", "3"], ["--windows", "0"], ["--questions", "9"], ["--leak"]):
        for command in (text, leaking):
            with pytest.raises(SystemExit) as e:
                command.main(args(world, *wrong))
            assert e.value.code == 2
    with pytest.raises(SystemExit):
        leaking.main(args(world, "--bank", world.bank))  # it reads none
    with pytest.raises(UserError, match="unsaid.bin is missing"):
        text.main(args(world, "--split", "unsaid"))
    with pytest.raises(UserError, match="is a directory: give a file"):
        leaking.main(args(world, "--json", tmp_path))
