"""Generation with recall: invariant 5, the rhythm of sec. 3.1, choosing, looking, remembering."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import corpus
import generate as generation
import kernels
import sample
from bank import MemoryBank
from generate import choose, generate, remember
from memory import Memories, attention_path
from model import Config, Memory3
from quantize import Codec
from retrieval import Given, Random, Retriever
from train import TrainConfig, make_optimizer, save_checkpoint
from views.explain import explain

ROOT = Path(corpus.__file__).parent


class Bank:
    """A bank in RAM: memory i is row i of a pool."""

    def __init__(self, memories):
        self.memories, self.loads = memories, []

    def recall(self, ids):
        self.loads.append(list(ids))
        assert sorted({*ids}) == list(ids) and min(ids) >= 0  # each once, and never "none"
        return self.memories[torch.as_tensor(ids)]


class Quantized(Bank):
    """The same, quantized."""

    def __init__(self, memories, codec):
        super().__init__(memories)
        self.codec, self.codes = codec, codec.encode(memories.kv)

    def recall(self, ids, decode=True):
        self.loads.append(decode)
        kv, ids = self.codes[torch.as_tensor(ids)], torch.as_tensor(ids)
        return Memories(self.codec.decode(kv) if decode else kv, self.memories.count[ids])


class Log:
    """A retriever that logs its calls and answers by the query's tokens: distinct references."""

    def __init__(self, n, table=None):
        self.n, self.calls, self.table = n, [], table

    def search(self, queries, k):
        queries = [q.split() if isinstance(q, str) else q for q in queries]
        self.calls.append([[int(t) for t in q] for q in queries])
        ids = [np.random.default_rng([*q, 7]).permutation(self.n)[:k] for q in self.calls[-1]]
        return np.array(ids), np.linspace(0.9, 0.1, k) + np.zeros((len(queries), 1))


@pytest.fixture
def bank(build, references):
    """The memories of 19 references, some with fewer tokens than slots, written by `build()`."""
    with torch.no_grad():
        return Bank(build().write(references([1 + (5 * i) % 13 for i in range(19)], 13)))


def some_tokens(B, T, seed=11):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 90, (B, T), generator=g)
    tokens[:, 0] = 96
    return tokens


def recorded(model, monkeypatch):
    """Keeps what model.decode returns: the cached logits, in the model's own precision."""
    steps, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda *a: steps.append(decode(*a)) or steps[-1])
    return steps


# ---------------------------------------------------------------------------------------------
# Invariant 5: cached generation = full forward


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", [21, 25, 5, 7, 1])  # 3C, 3C + 4, less than C, C, the BOS alone
def test_cached_generation_is_the_full_forward(build, bank, monkeypatch, T, B):
    """A chunk that reads its memories one token too early or too late, a context written over the
    memory slots, old memories left beside new ones, positions that start elsewhere."""
    model, n_new = build(), 24
    steps = recorded(model, monkeypatch)
    tokens, forced = some_tokens(B, T), some_tokens(B, n_new, seed=12)
    out, trace = generate(model, tokens, n_new, Log(19), bank, forced=forced)
    assert torch.equal(out, torch.cat([tokens, forced], 1))
    table = torch.from_numpy(trace.table(-(-(T + n_new) // 7)))
    assert len({tuple(row) for row in table.flatten(0, 1).tolist()}) >= B * 3  # recalls do change
    full = model(out, memories=bank.memories, recall=table)[0].detach()
    assert len(steps) == n_new - 1
    cached = torch.stack(steps, 1)
    torch.testing.assert_close(cached, full[:, T:-1], atol=1e-9, rtol=0)
    # the memories matter: one chunk with another recall is already far away
    other = table.clone()
    other[:, -2] = (other[:, -2] + 1) % 19
    moved = model(out, memories=bank.memories, recall=other)[0].detach()
    assert (moved - full)[:, T:-1].abs().amax(-1).max() > 1e-3
    # and the trace says how likely each token was
    logprobs = full[:, T - 1 : -1].log_softmax(-1).gather(-1, forced[..., None])[..., 0]
    torch.testing.assert_close(trace.logprobs.double(), logprobs, atol=1e-5, rtol=0)
    assert torch.equal(trace.greedy, full[:, T - 1 : -1].argmax(-1) == forced)


def test_in_float32_with_a_bfloat16_bank(build, bank):
    """Memories read in their stored precision by one path and in the model's by the other."""
    model = build(dtype=torch.float32)
    half = Bank(Memories(bank.memories.kv.bfloat16(), bank.memories.count))
    tokens, forced = some_tokens(2, 17), some_tokens(2, 25, seed=12)
    out, trace = generate(model, tokens, 25, Log(19), half, forced=forced)
    table = torch.from_numpy(trace.table(6))
    full = model(out, memories=half.memories, recall=table)[0].detach()
    logprobs = full[:, 16:-1].log_softmax(-1).gather(-1, forced[..., None])[..., 0]
    torch.testing.assert_close(trace.logprobs, logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("T", [1, 14, 16])
def test_without_memories(build, monkeypatch, plain, T):
    """The plain format with a header, or the empty pool without one."""
    model = build()
    steps = recorded(model, monkeypatch)
    tokens = some_tokens(2, T)
    out, trace = generate(model, tokens, 19, plain=plain)
    pool = None if plain else Memories.empty(model.config)
    with torch.no_grad():
        full = model(out, memories=pool)[0]
        other = model(out, memories=Memories.empty(model.config) if plain else None)[0]
    cached = torch.stack(steps, 1)
    torch.testing.assert_close(cached, full[:, T:-1], atol=1e-9, rtol=0)
    assert torch.equal(full[:, T - 1 : -1].argmax(-1), out[:, T:])  # temperature 0
    assert trace.recalls == [] and trace.greedy.all()
    assert (other - full).abs().max() > 1e-3


def test_a_batch_is_its_sequences(build, bank):
    """Memories of one sequence read by its neighbour in the batch."""
    model, tokens = build(), some_tokens(3, 16)
    together, trace = generate(model, tokens, 20, Log(19), bank)
    for b in range(3):
        alone, t = generate(model, tokens[b : b + 1], 20, Log(19), bank)
        assert torch.equal(alone[0], together[b])
        assert np.array_equal(t.table(6)[0], trace.table(6)[b])
        torch.testing.assert_close(t.logprobs[0], trace.logprobs[b], atol=1e-5, rtol=0)


def test_slots_without_a_memory_change_nothing(build, bank):
    """-1 read as the last memory; empty slots of short memories read; slots that keep what stood
    there before; a search that finds nothing at all."""
    model, tokens = build(), some_tokens(2, 16)
    forced = some_tokens(2, 13, seed=12)

    def run(ids, bank=bank):
        return generate(model, tokens, 13, Given(ids), bank, forced=forced)[1].logprobs

    want = run([[3, 8]] * 2)
    for ids in ([3, 8, -1, -1], [-1, 3, -1, 8], [8, -1, 3, -1]):
        torch.testing.assert_close(run([ids] * 2), want, atol=1e-5, rtol=0)
    assert (run([[3, 9]] * 2) - want).abs().max() > 1e-3
    nothing = generate(model, tokens, 13, forced=forced)[1].logprobs
    torch.testing.assert_close(run([[-1]] * 2), nothing, atol=1e-5, rtol=0)
    torch.testing.assert_close(run([[3, 8], [-1, -1]])[1], nothing[1], atol=1e-5, rtol=0)
    # whatever stands in the slots beyond `count`
    kv, count = bank.memories.kv.clone(), bank.memories.count
    assert count[8] == 2 and count[3] == 3
    for i, n in enumerate(count.tolist()):
        kv[i, ..., n:, :] = 1e3
    torch.testing.assert_close(run([[3, 8]] * 2, Bank(Memories(kv, count))), want)

    class Forgetful(Log):  # full slots first, then few, then none
        def search(self, queries, k):
            ids, scores = super().search(queries, k)
            ids[:, max(0, 5 - 2 * len(self.calls)) :] = -1
            return ids, scores

    forced = some_tokens(2, 17, seed=12)
    out, trace = generate(model, tokens, 17, retriever := Forgetful(19), bank, forced=forced)
    table = torch.from_numpy(trace.table(5))
    assert len(retriever.calls) == 3 and (table[:, -1] == -1).all() and (table[:, 0] >= 0).any()
    full = model(out, memories=bank.memories, recall=table)[0].detach().log_softmax(-1)
    logprobs = full[:, 15:-1].gather(-1, forced[..., None])[..., 0]
    torch.testing.assert_close(trace.logprobs.double(), logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("T", [21, 25, 5, 1])
def test_the_step_of_a_cuda_graph(build, bank, monkeypatch, T):
    """What a graph would repeat wrongly shows here, for it is the same code: a step that depends on
    a number Python took from a tensor, or moves what it writes to. And an answer that is seen only
    at a chunk's end to have stopped, as on a GPU: longer than it is, or with other tokens."""
    model, tokens, n_new, init = build(scale=3.0), some_tokens(2, T), 24, generation.Steps.__init__

    def run(**kw):
        return generate(model, tokens, n_new, Log(19), bank, **kw)

    def look_rarely(steps, *a):
        init(steps, *a)
        steps.look = 7

    hot = dict(temperature=1.3, top_k=9, top_p=0.9, seed=4)
    said = run()[0][0, T + 9].item()
    every = dict(stop=said), dict(stop=95), hot | dict(stop=said)
    want = [run(**kw) for kw in every]
    with monkeypatch.context() as m:
        m.setattr(generation.Steps, "__init__", look_rarely)
        for (a, x), (b, y) in zip(want, [run(**kw) for kw in every], strict=True):
            assert torch.equal(a, b) and torch.equal(x.greedy, y.greedy)
            assert torch.equal(x.logprobs, y.logprobs)
    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: 1 / 0)
    steps = generation.Steps(model, 2, 40, False, False, 1.3, 9, 0.9)
    with torch.no_grad():
        steps.start(tokens, None, 0)
        steps.keep(model(tokens, None, Memories.empty(model.config), None, steps.cache)[0][:, 0])
        before = [x.data_ptr() for x in (steps.tokens, steps.at, steps.logprobs, steps.greedy)]
        for _ in range(9):
            steps(model)
    assert before == [x.data_ptr() for x in (steps.tokens, steps.at, steps.logprobs, steps.greedy)]


def test_a_graph_is_replayed_only_on_the_weights_it_was_captured_on(build, monkeypatch):
    """Steps of an earlier call, replayed where one layer's weights lie elsewhere by now (.cpu() and
    .cuda() again), where something else is asked for, or never: captured anew for each answer."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # as steps_for sees it
    model = build()
    how = False, False, 0.0, 0, 1.0
    first = generation.steps_for(model, 2, 20, *how)
    assert generation.steps_for(model, 2, 31, *how) is first and first.tokens.shape == (2, 32)
    others = [(3, 20, *how), (2, 33, *how), (2, 20, False, True, *how[2:])]
    assert first not in [generation.steps_for(model, *key) for key in others]
    assert generation.steps_for(model, 2, 20, *how) is first
    last = model.blocks[-1].mlp.down.weight
    last.data = last.data.clone()
    assert generation.steps_for(model, 2, 20, *how) is not first and len(model.steps) == 4


def test_a_quantized_bank_recalls_its_codes(build, bank):
    """Codes read as if they were numbers; a step's recall that differs from the prompt's."""
    model = build(dtype=torch.float32)
    codec = Codec.train(bank.memories.kv.float().flatten(0, -2), "Residual2x4,PQ5x4")
    quantized = Quantized(bank.memories, codec)
    plain = Bank(Memories(codec.decode(quantized.codes), bank.memories.count))
    tokens = some_tokens(2, 17)
    want, x = generate(model, tokens, 23, Log(19), plain)
    got, y = generate(model, tokens, 23, Log(19), quantized)
    assert torch.equal(want, got) and torch.equal(x.logprobs, y.logprobs)
    assert quantized.loads == [True, False, False, False]


def test_generation_through_the_kernels(build, monkeypatch, emulator, references):
    """Kernels that are right alone and wrong together: memories written, read, decoded from codes
    into the cache and attended to by kernels.cu give what PyTorch gives, to bfloat16."""

    def with_kernels(device, dtype, n, dh=64, group=1, keys=0):
        return ("kernel", "a test") if keys else attention_path(device, dtype, n)

    model, refs = build(dtype=torch.bfloat16, head_dim=16, scale=4.0), references([13] * 19)
    tokens, forced, codec, runs = some_tokens(2, 17), some_tokens(2, 24, seed=12), None, []
    used, run = set(), kernels._run
    monkeypatch.setattr(kernels, "_run", lambda name, *a: used.add(name) or run(name, *a))
    for there in (False, True):
        if there:
            monkeypatch.setattr("memory.attention_path", with_kernels)
        with torch.no_grad():
            pool = model.write(refs)
        codec = codec or Codec.train(pool.kv.float().flatten(0, -2), "Residual2x4,PQ8x4")
        bank = Quantized(pool, codec)
        trace = generate(model, tokens, 24, Log(19), bank, forced=forced)[1]
        runs.append((pool.kv, trace.logprobs))
    (kv, slow), (kv_, fast) = runs
    assert used > {"memory_attention", "decode_attention", "decode_codes"}  # and the selection
    assert torch.equal(kv, kv_) and (fast - slow).abs().mean() < 0.02 * slow.abs().mean()


# ---------------------------------------------------------------------------------------------
# When it recalls, and by what (sec. 3.1)


@pytest.mark.parametrize(
    "T, n_new, prompt, later",
    [  # prompt: which tokens query, in one call; later: one call each; (start, end, chunk)
        (128, 128, [(0, 64, 0), (64, 128, 1)], [(128, 192, 3)]),  # the paper's three retrievals
        (128, 64, [(0, 64, 0), (64, 128, 1)], []),  # ends on a boundary: nobody would read more
        (128, 65, [(0, 64, 0), (64, 128, 1)], []),
        (128, 66, [(0, 64, 0), (64, 128, 1)], [(128, 192, 3)]),
        (131, 61, [(0, 64, 0), (64, 128, 1), (67, 131, 2)], []),
        (131, 125, [(0, 64, 0), (64, 128, 1), (67, 131, 2)], [(128, 192, 3)]),
        (64, 70, [(0, 64, 0)], [(64, 128, 2)]),
        (63, 67, [(0, 63, 0)], [(0, 64, 1), (64, 128, 2)]),  # shorter than a chunk
        (1, 10, [(0, 1, 0)], []),
    ],
)
@pytest.mark.parametrize("B", [1, 2])
def test_rhythm(build, bank, T, n_new, prompt, later, B):
    """A search a token, a search a prompt chunk, new memories at the first new token, a last prompt
    chunk asked for by its own few tokens."""
    model, retriever = build(chunk_len=64, max_context=256), Log(19)
    out, trace = generate(model, some_tokens(B, T), n_new, retriever, bank)

    def queries(spans):  # chunk by chunk, and in each chunk sequence by sequence
        return [out[b, start:end].tolist() for start, end, _ in spans for b in range(B)]

    assert retriever.calls == [queries(prompt)] + [queries([span]) for span in later]
    assert [r["chunk"] for r in trace.recalls] == [chunk for *_, chunk in prompt + later]
    assert len(bank.loads) == 1 + len(later)  # and one read of the bank for each search
    for r, (start, end, _) in zip(trace.recalls, prompt + later, strict=True):
        assert torch.equal(r["query"], out[:, start:end])
        ids, scores = Log(19).search(r["query"], 4)
        assert np.array_equal(r["ids"], ids) and np.array_equal(r["scores"], scores)
    # the memories of a chunk stay until the next recall
    table, held = trace.table(5), None
    at = {r["chunk"]: r["ids"] for r in trace.recalls}
    for chunk in range(5):
        held = at.get(chunk, held)
        assert np.array_equal(table[:, chunk], held)


# ---------------------------------------------------------------------------------------------
# Choosing


def test_choose_on_known_probabilities():
    """top_p that drops the token that crosses the line, or puts probabilities back in another
    order; a temperature that multiplies."""
    p = torch.tensor([0.2, 0.5, 0.3])
    logits = p.log().expand(20_000, 3)

    def drawn(temperature=1.0, top_k=0, top_p=1.0):
        g = torch.Generator().manual_seed(1)
        return choose(logits, temperature, top_k, top_p, g).bincount(minlength=3) / 20_000

    for got, want in [
        (drawn(), p),
        (drawn(temperature=0), [0, 1, 0]),
        (drawn(temperature=0.5), p**2 / (p**2).sum()),
        (drawn(temperature=2), p**0.5 / (p**0.5).sum()),
        (drawn(top_k=1), [0, 1, 0]),
        (drawn(top_k=2), [0, 0.625, 0.375]),
        (drawn(top_k=99), p),
        (drawn(top_p=0.4), [0, 1, 0]),
        (drawn(top_p=0.6), [0, 0.625, 0.375]),
        (drawn(top_p=0.9), p),
        (drawn(top_p=0.0), [0, 1, 0]),
        (drawn(top_k=2, top_p=0.6), [0, 1, 0]),  # of the two, the first alone has 0.625
    ]:
        torch.testing.assert_close(got, torch.as_tensor(want).float(), atol=0.015, rtol=0)
        assert torch.equal(got > 0, torch.as_tensor(want) > 0)


def test_temperature_and_seed(build, bank):
    """A seed that is ignored; top_k = 1 or a tiny top_p that is not greedy."""
    model, tokens = build(scale=3.0), some_tokens(2, 9)

    def run(**kw):
        return generate(model, tokens, 30, Log(19), bank, **kw)[0].tolist()

    greedy, hot = run(), run(temperature=1.5, seed=4)
    assert run(temperature=1.5, seed=4) == hot != run(temperature=1.5, seed=5)
    assert hot != greedy == run(seed=5)
    assert run(temperature=1.5, top_k=1, seed=9) == greedy == run(temperature=1.5, top_p=1e-6)
    before = torch.get_rng_state()
    run(temperature=1.5)
    assert torch.equal(before, torch.get_rng_state())  # nor does it disturb anybody else's


def test_forced_greedy_is_greedy_generation(build, bank):
    """eval.py calls an answer exact if each forced token was the likeliest: that must be the same
    as generating and comparing."""
    model, tokens = build(), some_tokens(2, 16)
    out, trace = generate(model, tokens, 23, Log(19), bank)
    assert trace.greedy.all()
    said = out[:, 16:]
    again = generate(model, tokens, 23, Log(19), bank, forced=said)[1]
    assert again.greedy.all() and torch.equal(again.logprobs, trace.logprobs)
    for at in (0, 11, 22):  # one token otherwise: not exact, and only from there on
        other = said.clone()
        other[1, at] = (other[1, at] + 1) % 90
        greedy = generate(model, tokens, 23, Log(19), bank, forced=other)[1].greedy
        assert greedy[0].all() and greedy[1, :at].all() and not greedy[1, at]


def test_stop(build, bank):
    """A batch that stops with its first sequence, or runs on after its last."""
    model, tokens = build(), some_tokens(3, 9)
    out, _ = generate(model, tokens, 60, Log(19), bank)
    said = out[:, 9:].tolist()
    common = set(said[0]) & set(said[1]) & set(said[2])
    stop = min(common or {said[0][20]}, key=lambda t: max(s.index(t) for s in said if t in s))
    short, trace = generate(model, tokens, 60, Log(19), bank, stop=stop)
    last = max(s.index(stop) if stop in s else 59 for s in said)
    assert torch.equal(short, out[:, : 9 + last + 1])
    assert trace.logprobs.shape == trace.greedy.shape == (3, last + 1)
    one, _ = generate(model, tokens[:1], 60, Log(19), bank, stop=said[0][5])
    assert torch.equal(one, out[:1, : 9 + said[0].index(said[0][5]) + 1])
    assert 96 not in said[0][:9]  # the BOS: in the prompt, which has not been said
    assert generate(model, tokens[:1], 9, Log(19), bank, stop=96)[0].shape == (1, 18)


def test_refusals(build, bank):
    """A page of tensor shapes, or a silent answer without memories, for a wrong call."""
    model, tokens = build(), some_tokens(1, 61)
    for call, line in [
        (lambda: generate(model, tokens, 30), "61 prompt tokens and 30 new ones; .* at most 90"),
        (lambda: generate(model, some_tokens(1, 95), 1), "at most 90: shorten the prompt"),
        (lambda: generate(model, tokens[:, :0], 3), "the prompt is empty"),
        (lambda: generate(model, tokens, 3, Log(19)), "both a retriever and a bank"),
        (lambda: generate(model, tokens, 3, None, bank), "both a retriever and a bank"),
        (lambda: generate(model, tokens, 3, Log(19), bank, plain=True), "plain"),
        (lambda: generate(model, tokens, 0), "0 new"),
        (lambda: generate(model, tokens, 3, forced=tokens[:, :2]), "forced is to be .1, 3. tokens"),
    ]:
        with pytest.raises(ValueError, match=line) as e:
            call()
        assert "\n" not in str(e.value)
    assert generate(model, tokens, 29)[0].shape == (1, 90)  # the context is used to its last token


# ---------------------------------------------------------------------------------------------
# Random and Given


def test_random_and_given():
    """An id that no reference has; a sequence that is given its neighbour's reference."""
    ids, scores = Random(19, seed=2).search([[0]] * 101, 4)
    assert ids.shape == scores.shape == (101, 4) and {*ids.ravel()} == {*range(19)}
    assert np.array_equal(ids, Random(19, seed=2).search([[0]] * 101, 4)[0])
    assert not np.array_equal(ids, Random(19, seed=3).search([[0]] * 101, 4)[0])
    ids, scores = Given([[5, 6], [7, 8]]).search(["a", "b"] * 3, 3)  # three chunks of two sequences
    assert ids.tolist() == [[5, 6, -1], [7, 8, -1]] * 3 and scores.shape == (6, 3)
    assert Given([[5, 6, 7]]).search(["a"], 2)[0].tolist() == [[5, 6]]


@pytest.fixture(scope="module")
def tok():
    return corpus.tokenizer(ROOT / "data/cities")


# ---------------------------------------------------------------------------------------------
# Everything together, on a data set of 17 made-up places

PLACES = "Aba Bel Cor Dun Eld Fen Gor Hul Ist Jar Kol Lum Mor Nis Orl Pry Qua".split()


def text_of(i):
    name = PLACES[i] + "holm"
    return f"{name} has {1013 * (i + 3)} people. {name} is in {PLACES[-i - 1]}land."


class World:
    """A prepared data set, a checkpoint and a bank in one directory."""

    def __init__(self, root, tok):
        self.data, self.tok = root / "data", tok
        self.data.mkdir(parents=True)
        shutil.copy(ROOT / "data/cities/tokenizer.json", self.data)
        meta = dict(name="places", tokenizer=str(self.data), n_vocab=tok.n_vocab)
        common.write_json(self.data / "meta.json", meta)
        texts = [tok.encode(text_of(i)) for i in range(len(PLACES))]
        refs = corpus.References.create(self.data / "kb", texts, tok.n_vocab)
        Retriever.build(f"{self.data}/kb.index", refs, str(self.data), progress=False)
        self.checkpoint, self.bank = root / "model.pt", root / "kb.bank"
        self.model = self.save(self.checkpoint, seed=1)
        MemoryBank.create(str(self.bank), self.model, refs).write()

    def save(self, path, seed, tokenizer=None, **changes):
        torch.manual_seed(seed)
        shape = dict(
            n_layer=3,
            n_memory_layer=2,
            n_head=6,
            n_kv_head=2,
            head_dim=12,
            mlp_width=34,
            vocab_size=self.tok.n_vocab,
            header=self.tok.header,
            max_context=190,
            chunk_len=16,
            n_recall=3,
            memory_tokens=5,
            ref_len=29,
        )
        model = Memory3(Config(**{**shape, **changes}))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(6.0) if p.dim() == 2 else None
        meta = dict(
            config=json.loads(json.dumps(vars(model.config))),
            stage="explicit",
            step=0,
            tokenizer=tokenizer or self.tok.id,
        )
        save_checkpoint(path, model, make_optimizer(model, TrainConfig()), meta)
        return model.eval()

    def open(self):
        refs = corpus.References.open(f"{self.data}/kb")
        return Retriever.open(f"{self.data}/kb.index"), MemoryBank.open(
            str(self.bank), self.model, refs
        )

    def args(self, *more, **changes):
        flags = dict(checkpoint=self.checkpoint, data=self.data, bank=self.bank, device="cpu")
        flags |= dict(prompt="How many people live in Belholm?", tokens=9, stop="") | changes
        return [*(str(x) for k, v in flags.items() for x in (f"--{k}", v)), *more]


@pytest.fixture(scope="module")
def built(tmp_path_factory, tok):
    return World(tmp_path_factory.mktemp("built") / "world", tok)


@pytest.fixture
def world(built, tmp_path):
    """A copy that a test may spoil."""
    root = built.data.parent
    shutil.copytree(root, tmp_path / "world")
    mine = object.__new__(World)
    mine.__dict__ = dict(vars(built), data=tmp_path / "world/data")
    mine.checkpoint, mine.bank = tmp_path / "world/model.pt", tmp_path / "world/kb.bank"
    meta = json.loads((mine.data / "meta.json").read_text())
    common.write_json(mine.data / "meta.json", meta | dict(tokenizer=str(mine.data)))
    return mine


def bytes_of(folder):
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def prompt_of(world, text):
    return torch.tensor([[world.tok.bos, *world.tok.encode(text)]])


def test_generating_changes_no_byte_of_the_bank(world):
    """Invariant 9: stored memories changed by those who read them."""
    before = bytes_of(world.data.parent)
    retriever, bank = world.open()
    for _ in range(2):
        out, trace = generate(world.model, prompt_of(world, text_of(4)), 40, retriever, bank)
        explain(world.model, world.tok, bank.references, out, trace, bank)
    assert bytes_of(world.data.parent) == before
    # and what it read is what the model writes
    ids = np.unique(trace.table(9))
    ids = ids[ids >= 0]
    fresh = world.model.write(bank.references.batch(ids))
    stored = bank.recall(ids)
    assert torch.equal(stored.kv.float(), fresh.kv.bfloat16().float())
    assert torch.equal(stored.count.cpu(), fresh.count)
    # the text of a reference recalls that reference
    assert trace.recalls[0]["ids"][0, 0] == 4


def test_remember(world):
    """A text cut off at ref_len, written twice, or found only by the next run."""
    retriever, bank = world.open()
    text = "Zubrowka City has 4242 people. Zubrowka City is in Zubrowka."
    c = world.model.config
    ids = remember(text, world.tok, c, retriever, bank)
    assert ids == [17] and len(bank.references) == len(retriever) == 18
    assert remember(text, world.tok, c, retriever, bank) == [17] and len(retriever) == 18
    # the same words in another order are another text
    other = "Zubrowka has 4242 people. Zubrowka City is in Zubrowka City."
    assert remember(other, world.tok, c, retriever, bank) == [18]
    assert remember(text, world.tok, c, retriever, bank) == [17]
    assert remember(other, world.tok, c, retriever, bank) == [18]
    # it is recalled at once, and what is read is what the model makes of it
    prompt = prompt_of(world, "What is the population of Zubrowka City?")
    _, trace = generate(world.model, prompt, 3, retriever, bank)
    assert {17, 18} <= {*trace.recalls[0]["ids"][0]}
    piece = torch.tensor([world.tok.encode(text)])
    want = world.model.write(piece).kv.bfloat16().float()
    assert torch.equal(bank.recall([17]).kv.float(), want)
    # a long text becomes several references of at most ref_len tokens
    long = " ".join(text_of(i) for i in (2, 3, 4)).replace("holm", "burg")
    tokens = world.tok.encode(long)
    n = -(-len(tokens) // 29)
    assert n > 1 and remember(long, world.tok, c, retriever, bank) == [*range(19, 19 + n)]
    assert [t for i in range(19, 19 + n) for t in bank.references[i].tolist()] == tokens
    for i in range(19, 19 + n):  # each is found by its own words
        found, scores = retriever.search([bank.references[i]], 1)
        assert (found[0, 0], round(float(scores[0, 0]), 4)) == (i, 1)
    # all of it is on disk: the next run finds it
    retriever, bank = world.open()
    assert len(retriever) == len(bank.references) == 19 + n
    assert retriever.search(["Zubrowka City"], 2)[0].max() <= 18
    assert torch.equal(bank.recall([17]).kv.float(), want)
    with pytest.raises(ValueError, match="--remember: the text is empty"):
        remember("", world.tok, c, retriever, bank)
    # a single token, and a script that the tokenizer never saw
    assert len(world.tok.encode("a")) == 1
    for odd in ("a", "東京都には4242人"):
        (i,) = remember(odd, world.tok, c, retriever, bank)
        assert world.tok.decode(bank.references[i]).strip() == odd
        assert int(bank.recall([i]).count) == min(5, len(bank.references[i]))


# ---------------------------------------------------------------------------------------------
# The command line


def test_main(world, capsys):
    """A flag that is accepted and dropped."""
    said = {}
    for memory in ("off", "random", "bank"):
        more = ["--explain"] if memory != "off" else []
        said[memory] = sample.main(world.args(*more, memory=memory))
        out = capsys.readouterr().out
        assert "How many people live in Belholm?" in out and "non-embedding weights" in out
        assert f"\n -> {said[memory].strip()}" in out
        assert ("recalled by" in out) == (memory != "off")
        if memory == "bank":
            assert "Belholm has" in re.sub("[₀-₉]", "", out)
    assert len({*said.values()}) == 3
    assert sample.main(world.args()) == said["bank"]
    assert sample.main(world.args("--plain")) not in said.values()
    warm = world.args("--temperature", "3", "--top_k", "50", "--top_p", "0.99")
    hot = [sample.main([*warm, "--seed", s]) for s in ("1", "1", "2")]
    assert hot[0] == hot[1] != hot[2] and said["bank"] not in hot
    assert sample.main(world.args("--temperature", "3", "--top_k", "1")) == said["bank"]
    # a stop token ends the answer, and no "." is asked for with --stop ""
    tokens = world.tok.encoding.encode_ordinary(said["bank"])
    short = sample.main(world.args(stop=world.tok.encoding.decode(tokens[:1])))
    assert said["bank"].startswith(short) and len(short) <= len(said["bank"])


def test_main_rag(world, capsys):
    """References put into the context and, besides, recalled; or the wrong ones."""
    said = sample.main(world.args("--rag"))
    out = capsys.readouterr().out
    shown = re.findall(r"in context: score (-?[\d.]+)  (.*)", out)
    assert len(shown) == 3 and shown[0][1] == text_of(1)
    retriever, bank = world.open()
    ids = retriever.search(["How many people live in Belholm?"], 3)[0][0]
    prompt = " ".join(text_of(i) for i in ids) + " How many people live in Belholm?"
    tokens, _ = generate(world.model, prompt_of(world, prompt), 9, plain=True)
    assert world.tok.decode(tokens[0, -9:]) == said


def test_main_remember(world, capsys):
    """What was remembered a moment ago is not in this answer."""
    asked = dict(prompt="What is the population of Zubrowka City?")
    without = sample.main(world.args(**asked))
    told = "Zubrowka City has 4242 people. Zubrowka City is in Zubrowka."
    capsys.readouterr()
    first = sample.main(world.args("--remember", told, "--explain", **asked))
    out = capsys.readouterr().out
    assert "remembered as reference 17" in out and "reference 17\n" in out
    assert told in re.sub("[₀-₉]", "", out) and first != without
    assert sample.main(world.args("--remember", told, **asked)) == first
    assert "remembered as reference 17" in capsys.readouterr().out
    assert sample.main(world.args(**asked)) == first  # and it stays


def test_bad_input_is_one_line(world, tmp_path, monkeypatch):
    """A traceback for a typing error, or a bank of another model read as if it were this one's."""
    world.save(tmp_path / "other.pt", seed=2)
    world.save(tmp_path / "wide.pt", seed=1, n_recall=23)
    world.save(tmp_path / "foreign.pt", seed=1, tokenizer="gpt2:12345678")
    (tmp_path / "broken.pt").write_bytes(world.checkpoint.read_bytes()[:999])
    before = bytes_of(world.data.parent)
    empty = tmp_path / "empty"
    shutil.copytree(world.data, empty)
    (empty / "kb.bin").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for args, line in [
        (world.args(prompt="Belholm " * 190), "shorten the prompt"),
        (world.args(tokens=0), "--tokens: from 1"),
        (world.args(prompt=" "), "--prompt is empty"),
        (world.args("--remember", "Bazq", prompt="Belholm " * 190), "shorten the prompt"),
        (world.args("--remember", "Bazq", stop="one two"), "it must be one"),
        (world.args(stop="three tokens."), "--stop 'three tokens.' is . tokens; it must be one"),
        (world.args("--rag", memory="random"), "--memory random goes with neither"),
        (world.args("--remember", ""), "--remember: the text is empty"),
        (world.args(checkpoint="nowhere.pt"), "nowhere.pt: no checkpoint there"),
        (world.args(checkpoint="broken.pt"), "broken.pt: not a checkpoint"),
        (world.args(checkpoint="foreign.pt"), "trained with tokenizer gpt2:12345678"),
        (world.args(checkpoint="other.pt"), "kb.bank"),
        (world.args(bank="nowhere.bank"), "nowhere.bank"),
        (world.args(data=str(tmp_path / "nodata")), "nodata/meta.json is missing"),
        (world.args("--references", "nokb"), "nokb.bin is missing"),
        (world.args(data=empty), "kb.bin is empty"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=line) as e:
            sample.main(args)
        assert "\n" not in str(e.value), line
    assert bytes_of(world.data.parent) == before
    # the command ends with the line, not with a traceback
    monkeypatch.setattr(sys, "argv", ["sample.py", *world.args(checkpoint="nowhere.pt")])
    with pytest.raises(SystemExit, match="^sample.py: nowhere.pt: no checkpoint there"):
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    for wrong in (["--promt", "x"], [], world.args("--memory", "all"), world.args("--seed", "x")):
        with pytest.raises(SystemExit) as e:
            sample.main(wrong)
        assert e.value.code == 2


def test_more_memories_than_references(world, tmp_path):
    """k > N: FAISS pads with -1, and nobody says that the knowledge base is too small."""
    world.save(tmp_path / "wide.pt", seed=1, n_recall=23)
    model = generation.load_checkpoint(tmp_path / "wide.pt")[0]
    refs = corpus.References.open(f"{world.data}/kb")
    MemoryBank.create(str(tmp_path / "wide.bank"), model, refs).write()
    with pytest.raises(ValueError, match="k = 23 of N = 17 references"):
        sample.main(world.args(checkpoint=tmp_path / "wide.pt", bank=tmp_path / "wide.bank"))
