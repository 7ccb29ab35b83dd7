"""The engine: invariant 5, the rhythm of sec. 3.1, sampling, remembering, opening a model."""

import argparse
import doctest
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from world import (
    Bank,
    Log,
    Quantized,
    World,
    bytes_of,
    copy_of,
    prompt_of,
    some_tokens,
    text_of,
)

import corpus
import generate as generation
import kernels
from common import UserError
from generate import generate, remember, sample_token
from memory import Memories, attention_path
from model import Config, Memory3
from quantize import Codec
from retrieval import Given, Random
from views.explain import explain


@pytest.fixture
def bank(build, references):
    """The memories of 19 references, some with fewer tokens than slots, written by `build()`."""
    with torch.no_grad():
        return Bank(build().write(references([1 + (5 * i) % 13 for i in range(19)], 13)))


def recorded(model, monkeypatch):
    """Keeps what model.decode returns: the cached logits, in the model's own precision."""
    steps = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *a: steps.append(decode(*a)) or steps[-1])
    return steps


# ---------------------------------------------------------------------------------------------
# Invariant 5: cached generation = full forward


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", [21, 25, 5, 7, 1])  # 3C, 3C + 4, less than C, C, the BOS alone
def test_cached_generation_is_the_full_forward(build, bank, monkeypatch, T, B):
    """A chunk that reads its memories one token too early or too late, a context written over the
    memory slots, old memories left beside new ones, positions that start elsewhere."""
    model = build()
    n_new = 24
    steps = recorded(model, monkeypatch)
    tokens = some_tokens(B, T)
    forced = some_tokens(B, n_new, seed=12)
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
    tokens = some_tokens(2, 17)
    forced = some_tokens(2, 25, seed=12)
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
    model = build()
    tokens = some_tokens(3, 16)
    together, trace = generate(model, tokens, 20, Log(19), bank)
    for b in range(3):
        alone, t = generate(model, tokens[b : b + 1], 20, Log(19), bank)
        assert torch.equal(alone[0], together[b])
        assert np.array_equal(t.table(6)[0], trace.table(6)[b])
        torch.testing.assert_close(t.logprobs[0], trace.logprobs[b], atol=1e-5, rtol=0)


def test_slots_without_a_memory_change_nothing(build, bank):
    """-1 read as the last memory; empty slots of short memories read; slots that keep what stood
    there before; a search that finds nothing at all."""
    model = build()
    tokens = some_tokens(2, 16)
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
    kv = bank.memories.kv.clone()
    count = bank.memories.count
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
    retriever = Forgetful(19)
    out, trace = generate(model, tokens, 17, retriever, bank, forced=forced)
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
    model = build(scale=3.0)
    tokens = some_tokens(2, T)
    n_new = 24
    init = generation.Steps.__init__

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
    for name in ("item", "tolist", "__bool__", "__index__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: 1 / 0)
    looks = []  # on a CPU decode_attention looks at the length, once a layer; nothing else may
    to_int = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda x: looks.append(x) or to_int(x))
    steps = generation.Steps(model, 2, 40, False, False, 1.3, 9, 0.9)
    with torch.no_grad():
        steps.start(tokens, None, 0)
        steps.keep(model(tokens, None, Memories.empty(model.config), None, steps.cache)[0][:, 0])
        before = [x.data_ptr() for x in (steps.tokens, steps.at, steps.logprobs, steps.greedy)]
        for _ in range(9):
            steps(model)
    assert len(looks) == 9 * model.config.n_layer
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

    model = build(dtype=torch.bfloat16, head_dim=16, scale=4.0)
    refs = references([13] * 19)
    tokens = some_tokens(2, 17)
    forced = some_tokens(2, 24, seed=12)
    codec = None
    runs = []
    used = set()
    run = kernels._run
    monkeypatch.setattr(
        kernels, "_run", lambda name, *a, **kw: used.add(name) or run(name, *a, **kw)
    )
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
    model = build(chunk_len=64, max_context=256)
    retriever = Log(19)
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
    table = trace.table(5)
    held = None
    at = {r["chunk"]: r["ids"] for r in trace.recalls}
    for chunk in range(5):
        held = at.get(chunk, held)
        assert np.array_equal(table[:, chunk], held)


# ---------------------------------------------------------------------------------------------
# Sampling


def test_sampling_on_known_probabilities():
    """top_p that drops the token that crosses the line, or puts probabilities back in another
    order; a temperature that multiplies."""
    p = torch.tensor([0.2, 0.5, 0.3])
    logits = p.log().expand(20_000, 3)

    def drawn(temperature=1.0, top_k=0, top_p=1.0):
        g = torch.Generator().manual_seed(1)
        return sample_token(logits, temperature, top_k, top_p, g).bincount(minlength=3) / 20_000

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
    model = build(scale=3.0)
    tokens = some_tokens(2, 9)

    def run(**kw):
        return generate(model, tokens, 30, Log(19), bank, **kw)[0].tolist()

    greedy = run()
    hot = run(temperature=1.5, seed=4)
    assert run(temperature=1.5, seed=4) == hot != run(temperature=1.5, seed=5)
    assert hot != greedy == run(seed=5)
    assert run(temperature=1.5, top_k=1, seed=9) == greedy == run(temperature=1.5, top_p=1e-6)
    before = torch.get_rng_state()
    run(temperature=1.5)
    assert torch.equal(before, torch.get_rng_state())  # nor does it disturb anybody else's


def test_forced_greedy_is_greedy_generation(build, bank):
    """eval.py calls an answer exact if each forced token was the likeliest: that must be the same
    as generating and comparing."""
    model = build()
    tokens = some_tokens(2, 16)
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
    model = build()
    tokens = some_tokens(3, 9)
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
    model = build()
    tokens = some_tokens(1, 61)
    for call, line in [
        (lambda: generate(model, tokens, 30), "61 prompt .* at most 29 .--tokens"),
        (lambda: generate(model, some_tokens(1, 95), 1), "max_context = 90: shorten the prompt"),
        (lambda: generate(model, tokens[:, :0], 3), "the prompt is empty"),
        (lambda: generate(model, tokens, 3, Log(19)), "both a retriever and a bank"),
        (lambda: generate(model, tokens, 3, None, bank), "both a retriever and a bank"),
        (lambda: generate(model, tokens, 3, Log(19), bank, plain=True), "plain"),
        (lambda: generate(model, tokens, 0), "0 new"),
        (lambda: generate(model, tokens, 3, forced=tokens[:, :2]), "forced must be .1, 3. tokens"),
        (lambda: generate(model, tokens, 2, forced=torch.tensor([[1, 97]])), "token ids, 0 to 96"),
        (lambda: generate(model, tokens, 2, forced=torch.tensor([[-1, 5]])), "token ids, 0 to 96"),
        (lambda: generate(model, tokens, 2, temperature=1.0, top_k=-1), "top_k -1: give a number"),
        (lambda: generate(model, tokens, 2, temperature=1.0, top_p=-0.1), "top_p -0.1: give a num"),
        (lambda: generate(model, tokens, 2, temperature=1.0, top_p=math.nan), "top_p nan: give a"),
        (lambda: generate(model, tokens, 2)[1].table(3), "nothing was recalled"),
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


@pytest.fixture(scope="module")
def built(tmp_path_factory, tok):
    return World(tmp_path_factory.mktemp("built") / "world", tok)


@pytest.fixture
def world(built, tmp_path):
    """A copy that a test may spoil."""
    return copy_of(built, tmp_path / "world")


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
    before = len(retriever)
    for blank in ("", "  ", "\n", "?!", "\u200b"):  # what no question could find again
        with pytest.raises(ValueError, match="there is no word in it"):
            remember(blank, world.tok, c, retriever, bank)
    assert len(retriever) == before == len(bank.references)
    # a single token, and a script that the tokenizer never saw
    assert len(world.tok.encode("a")) == 1
    for odd in ("a", "東京都には4242人"):
        (i,) = remember(odd, world.tok, c, retriever, bank)
        assert world.tok.decode(bank.references[i]).strip() == odd
        assert int(bank.recall([i]).count) == min(5, len(bank.references[i]))


def test_a_tiny_temperature_is_the_likeliest_token():
    """Logits that overflow to inf, whose softmax is nan, whose argmax is token 0."""
    logits = torch.tensor([[0.5, -3.0, 7.25, 7.0], [-90.0, 1.0, 0.0, -1e30]])
    g = torch.Generator().manual_seed(0)
    for temperature in (1e-38, 1e-45, 5e-324, 1e-9):
        for more in ((0, 1.0), (3, 1.0), (0, 0.9), (2, 1e-38)):
            got = sample_token(logits, temperature, *more, g)
            assert got.tolist() == [2, 1], (temperature, more)
            half = sample_token(logits.bfloat16(), temperature, *more, g)
            assert half.tolist()[1] == 1
    huge = torch.tensor([[3e38, -3e38, 2e38]])  # differences beyond float32
    assert sample_token(huge, 0.5, 0, 1.0, g).tolist() == [0]
    two = torch.tensor([[4.0, -1.0, 4.0]]).expand(400, 3)  # a tie stays a tie
    assert set(sample_token(two, 1e-38, 0, 1.0, g).tolist()) == {0, 2}


def test_the_bank_follows_the_data(world, capsys):
    """Memories of the demo read for another knowledge base; a cure that writes a wrong bank."""
    assert generation.place(generation.BANK, "data/cities/", "kb") == "out/cities/kb.bank"
    assert generation.place(generation.BANK, "/x/y", "other") == "out/y/other.bank"
    assert generation.place("mine {0}", "/x/y", "other") == "mine {0}"
    a = argparse.Namespace(checkpoint="c.pt", data=str(world.data), references="kb")
    a.kb = a.filter = []
    a.bank = str(world.bank.with_name("none.bank"))
    with pytest.raises(ValueError) as e:
        generation.open_memory(a, world.model)
    cure = f"python write.py --checkpoint c.pt --data {world.data} --references kb --out {a.bank}"
    assert str(e.value).endswith(cure)
    bank = generation.open_memory(a, world.model, cold_start=True)[2]
    assert len(bank) == 17
    bank.recall([3])
    assert bank.encoded == 1


def test_docstrings():
    """A worked example that its function no longer gives."""
    found = doctest.testmod(generation)
    assert found.attempted >= 1 and not found.failed


@pytest.mark.parametrize(
    "tokens, how, line",
    [
        ([[0, 10**6]], {}, "the prompt has 0 to 1000000"),
        ([[-1, 5]], {}, "the prompt has -1 to 5"),
        ([0, 5], {}, r"prompts of shape \(2,\)"),
        ([[0, 5]], dict(temperature=float("nan")), "temperature nan: give a number from 0"),
        ([[0, 5]], dict(temperature=-1.0), "temperature -1.0: give a number from 0"),
    ],
)
def test_what_is_no_prompt(tokens, how, line):
    """An id that the model has not, found deep within it; a temperature that gives token 0."""
    model = Memory3(Config.preset("toy", vocab_size=301, n_layer=2, n_memory_layer=1))
    with pytest.raises(UserError, match=line):
        generate(model, torch.tensor(tokens), 2, **how)
