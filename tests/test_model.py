"""The decoder: the plain model, the format with memories, writing, gradients, configs, files."""

import doctest
import math
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY
from torch.utils.flop_counter import FlopCounterMode

import memory
import model as model_module
from common import UserError
from memory import Memories
from model import (
    PRESETS,
    Block,
    Cache,
    Config,
    Memory3,
    apply_rope,
    load_checkpoint,
    rope_table,
    save_checkpoint,
)

LENGTHS = [13, 4, 9, 1, 11, 6]  # of the references; 4 and 1 are fewer than the 5 that are kept
T = 25  # 3 chunks of 7 and 4 tokens
RECALL = torch.tensor(
    [
        [[0, 3, -1, 2], [-1, -1, -1, -1], [3, 0, 1, -1], [2, -1, -1, -1]],
        [[-1, 4, -1, 0], [0, 1, 3, 4], [4, -1, -1, -1], [-1, 2, 1, 4]],
    ]
)  # nobody reads memory 5; sequence 0 reads 4 nowhere


@pytest.fixture(params=[0, 1], ids=lambda first: f"memory_from {first}")
def case(request, build, references):
    """A model in float64 whose memory layers are the first three or the last three, 2 sequences, 6
    references."""
    g = torch.Generator().manual_seed(8)
    model = build(memory_from=request.param)
    return model, torch.randint(0, 90, (2, T), generator=g), references(LENGTHS)


# ---------------------------------------------------------------------------------------------
# The plain model


@pytest.mark.parametrize("tied", [False, True])
def test_plain_model_equals_llama(config, build, tied):
    """Catches any drift from an ordinary decoder: RoPE's pairs and base, the order of gate and up,
    groups of query heads, eps, which norm stands where, an untied head that is tied."""
    transformers = pytest.importorskip("transformers")
    ours = build(torch.float32, tied=tied)
    c = ours.config
    assert c.rope_base == 10000.0  # Llama's default, whose name changes between versions
    kv = c.n_kv_head * c.head_dim
    llama = (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=c.vocab_size,
                hidden_size=c.n_embd,
                intermediate_size=c.mlp_width,
                num_hidden_layers=c.n_layer,
                num_attention_heads=c.n_head,
                num_key_value_heads=c.n_kv_head,
                head_dim=c.head_dim,
                rms_norm_eps=c.norm_eps,
                tie_word_embeddings=tied,
                attention_bias=False,
                mlp_bias=False,
            )
        )
        .float()
        .eval()
    )
    weights = {"model.embed_tokens.weight": ours.embed.weight, "lm_head.weight": ours.head.weight}
    weights["model.norm.weight"] = ours.norm.weight
    for l, b in enumerate(ours.blocks):
        q, k, v = b.attn.qkv.weight.split([c.n_embd, kv, kv])
        gate, up = b.mlp.gate_up.weight.chunk(2)
        for name, w in {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": b.attn.out.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": b.mlp.down.weight,
            "input_layernorm": b.norm1.weight,
            "post_attention_layernorm": b.norm2.weight,
        }.items():
            weights[f"model.layers.{l}.{name}.weight"] = w
    missing, unknown = llama.load_state_dict(weights, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}
    tokens = torch.randint(0, c.vocab_size, (3, 29), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        a = ours(tokens)[0]
        b = llama(tokens).logits
    assert b.std() > 0.3  # logits that say something
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_plain_model_ignores_everything_about_memories(case):
    """Catches a header, shifted positions or a table in the plain format (the implicit stage)."""
    model, tokens, refs = case
    plain, loss = model(tokens)
    assert loss is None and plain.shape == (2, T, 97)
    with torch.no_grad():
        model.config.header = (1,)
        model.config.ref_len = 3
        model.config.chunk_len = 2
    assert torch.equal(plain, model(tokens, recall=RECALL)[0])


def test_format_with_memories_is_the_header_in_front_and_a_gap(case):
    """Catches wrong positions: with an empty pool, the format is an ordinary decoder over header
    and context, whose positions jump by ref_len. With a jump of 0 it is the plain model."""
    model, tokens, refs = case
    with_header = torch.cat([torch.tensor([model.config.header] * 2), tokens], 1)
    with_gap = model(tokens, memories=Memories.empty(model.config))[0]
    plain = model(with_header)[0][:, 3:]
    assert not with_gap.allclose(plain, atol=1e-3)  # it is felt
    model.config.ref_len = 0
    without_gap = model(tokens, memories=Memories.empty(model.config))[0]
    torch.testing.assert_close(without_gap, plain, rtol=1e-10, atol=1e-11)


def test_loss_is_the_mean_cross_entropy_of_the_context(case):
    """Catches a loss over ignored targets, over the header, or over references: it must be the mean
    over the context's own targets, whatever was recalled."""
    model, tokens, refs = case
    targets = tokens.roll(-1, 1).masked_fill(torch.arange(T) % 3 == 1, -1)
    logits, loss = model(tokens, targets, model.write(refs), RECALL)
    assert logits.shape == (2, T, 97)
    logp = logits.log_softmax(-1)
    terms = []
    for b in range(2):
        for t in range(T):
            if targets[b, t] >= 0:
                terms.append(-logp[b, t, targets[b, t]])
    assert len(terms) == 2 * 17
    torch.testing.assert_close(loss, torch.stack(terms).mean().to(loss.dtype), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------
# Reading


def test_order_unused_slots_and_unnamed_memories_change_nothing(case):
    """Catches memories with an order among them, empty slots that take attention, and a pool whose
    size leaks into sequences that never named the new rows (invariant 2)."""
    model, tokens, refs = case
    with torch.no_grad():
        pool = model.write(refs)
        logits = model(tokens, memories=pool, recall=RECALL)[0]
        flipped = model(tokens, memories=pool, recall=RECALL.flip(-1))[0]
        torch.testing.assert_close(logits, flipped, rtol=1e-10, atol=1e-11)

        order = torch.tensor([3, 5, 0, 4, 1, 2])  # the pool itself in another order
        place = order.argsort()
        table = torch.where(RECALL < 0, -1, place[RECALL])
        moved = model(tokens, memories=pool[order], recall=table)[0]
        torch.testing.assert_close(logits, moved, rtol=1e-10, atol=1e-11)

        wide = torch.cat([torch.full((2, 4, 2), -1), RECALL], -1)  # R = 6, two of them unused
        torch.testing.assert_close(
            logits, model(tokens, memories=pool, recall=wide)[0], rtol=1e-10, atol=1e-11
        )
        poisoned = Memories(pool.kv.clone(), pool.count)
        poisoned.kv[5] = 33.0
        for m, n in enumerate(pool.count.tolist()):
            poisoned.kv[m, :, :, :, n:] = 77.0
        assert torch.equal(logits, model(tokens, memories=poisoned, recall=RECALL)[0])
        assert not logits.allclose(model(tokens, memories=pool)[0], atol=1e-3)  # they are read


def test_changing_a_token_changes_no_logit_before_it(case):
    """Catches a look ahead in either format, and in the merge of memories (invariant 6)."""
    model, tokens, refs = case
    with torch.no_grad():
        pool = model.write(refs)
        for options in ({}, dict(memories=pool, recall=RECALL)):
            logits = model(tokens, **options)[0]
            for t in (0, 6, 7, 20, 24):
                changed = tokens.clone()
                changed[0, t] = (tokens[0, t] + 1) % 90
                after = model(changed, **options)[0]
                torch.testing.assert_close(after[0, :t], logits[0, :t], rtol=1e-11, atol=1e-12)
                assert torch.equal(after[1], logits[1])
                assert (after[0, t] - logits[0, t]).abs().max() > 1e-4


def test_changing_a_memory_changes_nothing_before_the_chunk_that_recalls_it(case):
    """Catches a chunk that reads its neighbour's memories, and memory layers beyond Lm."""
    model, tokens, refs = case
    with torch.no_grad():
        pool = model.write(refs)
        logits = model(tokens, memories=pool, recall=RECALL)[0]
        for m in range(6):
            other = Memories(pool.kv.clone(), pool.count)
            other.kv[m, :, :, :, : pool.count[m]] += 1.0
            after = model(tokens, memories=other, recall=RECALL)[0]
            for b in range(2):
                readers = [c for c in range(4) if m in RECALL[b, c].tolist()]
                first = min(readers) * 7 if readers else T
                assert torch.equal(after[b, :first], logits[b, :first])
                for t in range(first, min(first + 7, T)):  # all of the chunk, from its first token
                    assert (after[b, t] - logits[b, t]).abs().max() > 1e-5


def test_header_is_read_and_attends_no_memory(case):
    """Catches a header outside of the softmax, and a header that reads the first chunk's memories:
    its own keys in the cache must not depend on them, the context's must."""
    model, tokens, refs = case
    pool = model.write(refs)

    def keys(recall):
        cache = Cache(model.config, 2, T, dtype=torch.float64)
        with torch.no_grad():
            model(tokens, memories=pool, recall=recall, cache=cache)
        return cache.kv

    with_memories = keys(RECALL)
    without = keys(None)
    for a, b in zip(with_memories, without, strict=True):
        torch.testing.assert_close(a[:, :, :, :3], b[:, :, :, :3], rtol=1e-11, atol=1e-12)
    assert not with_memories[2][:, :, :, 3:].allclose(without[2][:, :, :, 3:], atol=1e-4)
    before = model(tokens, memories=pool, recall=RECALL)[0]
    model.config.header = (96, 94, 92)
    assert not before.allclose(model(tokens, memories=pool, recall=RECALL)[0], atol=1e-4)


# ---------------------------------------------------------------------------------------------
# Writing


def by_hand(model, reference):
    """The memory of one reference (n,), from a plain forward over header + reference: keys and
    values from its cache, the choice by sec. 3.3 from queries and keys caught before RoPE."""
    c = model.config
    n = len(reference)
    caught = []
    hooks = [
        b.attn.qkv.register_forward_hook(lambda m, x, y: caught.append(y)) for b in model.blocks
    ]
    tokens = torch.cat([torch.tensor(c.header), reference])[None]
    cache = Cache(c, 1, 3 + n, header=False, dtype=torch.float64)
    with torch.no_grad():
        model(tokens, cache=cache)
    for hook in hooks:
        hook.remove()
    kv = torch.zeros(c.memory_shape, dtype=torch.float64)
    index = torch.full((3, 2, 5), -1)
    for i in range(3):
        l = c.memory_from + i
        x = caught[l][0, 3:].view(n, 10, 10)  # (n, H + 2 Hkv, dh), without the header
        for h in range(2):
            k = x[:, 6 + h]
            w = torch.zeros(n, dtype=torch.float64)
            for q in range(3 * h, 3 * h + 3):
                w += (x[:, q] @ k.T / math.sqrt(10)).softmax(-1).sum(0)
            keep = sorted(w.argsort(descending=True)[:5].tolist())
            index[i, h, : len(keep)] = torch.tensor(keep)
            kv[i, :, h, : len(keep)] = cache.kv[l][:, 0, h, 3:][:, keep]
    return kv, index


def test_write_equals_the_plain_model_over_header_and_reference(case):
    """Catches memories written at other positions than header + reference, from another layer, with
    keys before RoPE, with the header or padding among the kept, in another order (invariant 7)."""
    model, _, refs = case
    pool, index = model.write(refs, return_indices=True)
    assert pool.kv.shape == (6, 3, 2, 2, 5, 10) and index.shape == (6, 3, 2, 5)
    assert pool.count.tolist() == [5, 4, 5, 1, 5, 5]
    for m, n in enumerate(LENGTHS):
        kv, keep = by_hand(model, refs[m, :n])
        assert torch.equal(index[m], keep)
        torch.testing.assert_close(pool.kv[m], kv, rtol=1e-10, atol=1e-12)
        filled = int(pool.count[m])
        assert (index[m, ..., :filled] >= 0).all() and (index[m] < n).all()
        assert (index[m, ..., filled:] == -1).all() and (pool.kv[m, ..., filled:, :] == 0).all()
    heads = {tuple(row) for row in index[0].flatten(0, 1).tolist()}
    assert len(heads) > 1  # each key-value head of each layer chooses for itself


def test_the_same_reference_gives_the_same_memory_in_any_batch(case, references):
    """Catches padding that is attended, and statistics of the batch: what training writes (wide,
    among others) is what is written alone, narrow, in another order (invariant 3)."""
    model, _, refs = case
    with torch.no_grad():
        pool = model.write(refs)
        wide = model.write(F.pad(refs, (0, 13 - refs.shape[1]), value=-1).flip(0))
        for m, n in enumerate(LENGTHS):
            alone = model.write(refs[m : m + 1, :n])
            assert alone.count.item() == pool.count[m] == wide.count[5 - m]
            torch.testing.assert_close(alone.kv[0], pool.kv[m], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(wide.kv[5 - m], pool.kv[m], rtol=1e-10, atol=1e-12)
        single = model.float()
        a = single.write(refs)
        b = single.write(refs[1:2, :4])
        torch.testing.assert_close(a.kv[1], b.kv[0], rtol=1e-5, atol=2e-6)


def test_approximate_weights_reach_write(build, references):
    """Catches the config's approximate_weights being accepted and dropped."""
    refs = references([13, 12, 13])
    exact = build()
    approximate = build(approximate_weights=True)
    a, b = (m.write(refs, return_indices=True)[1] for m in (exact, approximate))
    assert a.shape == b.shape and not torch.equal(a, b)


def test_write_uses_no_layer_after_its_last_keys(case):
    """Catches work and gradients where references have left: layer Lm-1 gives keys and values, and
    nothing of it after that (W_O, MLP) nor of later layers is touched."""
    model, _, refs = case
    last = model.blocks[model.config.memory_layers[-1]]
    before = model.write(refs).kv
    with torch.no_grad():
        later = model.blocks[model.config.memory_layers.stop :].parameters()
        for p in (last.attn.out.weight, *last.mlp.parameters(), *later):
            p.fill_(math.nan)
    assert torch.equal(model.write(refs).kv, before)


def test_bad_references_are_refused_in_one_line(case):
    """Catches silent truncation of a long reference and tokens behind padding."""
    model, _, refs = case
    for bad in (torch.zeros(2, 14, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        with pytest.raises(ValueError, match="takes 1 to .*13"):
            model.write(bad)
    with pytest.raises(ValueError, match="left-aligned"):
        model.write(torch.tensor([[4, -1, 5]]))
    with pytest.raises(ValueError, match="max_context"):
        model(torch.zeros(1, 91, dtype=torch.int64))


HEADS = "1.1,3.0,2.1,2.0"  # of layers 1, 2, 3 with 2 heads each: all but 1.0 and 3.1


def test_heads_that_keep_no_memories(build, references):
    """Catches heads that write or read though they are not to, places of other heads, and kept
    heads that change because others do not keep."""
    all_heads = build(memory_from=1)
    few_heads = build(memory_from=1, memory_heads=HEADS)
    refs = references(LENGTHS)
    pool, index = all_heads.write(refs, return_indices=True)
    part, kept = few_heads.write(refs, return_indices=True)
    where = torch.tensor([[0, 1], [1, 1], [1, 0]], dtype=bool)[:, :, None]  # (Lm, Hkv, 1)
    assert torch.equal(kept, index.where(where, -1))
    assert torch.equal(part.kv, pool.kv.where(where[:, None, ..., None], 0.0))
    assert torch.equal(part.count, pool.count)

    tokens = torch.randint(0, 90, (2, T), generator=torch.Generator().manual_seed(18))
    poisoned = Memories(part.kv.where(where[:, None, ..., None], 1e6), part.count)
    with torch.no_grad():
        logits = few_heads(tokens, memories=poisoned, recall=RECALL)[0]
        assert torch.equal(logits, few_heads(tokens, memories=part, recall=RECALL)[0])
        for other in (
            all_heads(tokens, memories=pool, recall=RECALL),
            few_heads(tokens, memories=part),
        ):
            assert not logits.allclose(other[0], atol=1e-3)
        cache = Cache(few_heads.config, 2, T, dtype=torch.float64)
        out = [few_heads(tokens[:, :14], None, poisoned, RECALL[:, :2], cache)[0][:, 0]]
        for t in range(14, T):
            if t % 7 == 0:
                cache.load_memories(poisoned, RECALL[:, t // 7])
            out.append(few_heads.decode(tokens[:, t], cache))
        torch.testing.assert_close(torch.stack(out, 1), logits[:, 13:], rtol=1e-9, atol=1e-10)

    part.kv.retain_grad()
    few_heads(tokens, tokens.roll(-1, 1), part, RECALL)[1].backward()
    assert (part.kv.grad.where(~where[:, None, ..., None], 0) == 0).all()
    assert (part.kv.grad[0, 0, :, 1] != 0).all()


def test_kept_heads_are_named_in_one_way(build):
    """Catches two texts for the same heads (their banks would refuse each other), all heads that
    are not "all", a record of the wrong size, and heads that do not exist."""
    tiny = {**TINY, "memory_from": 1}
    config = Config(**tiny, memory_heads=HEADS)
    assert config.memory_heads == "1.1,2.0,2.1,3.0" == Config(**asdict(config)).memory_heads
    assert config.kept_heads == [(0, 1), (1, 0), (1, 1), (2, 0)]
    assert config.record_shape == (4, 2, 5, 10) and config.memory_shape == (3, 2, 2, 5, 10)
    every = Config(**tiny, memory_heads="3.1, 1.0,1.1,2.0,2.1,3.0,3.0")
    assert every.memory_heads == "all" and every.kept_heads is None
    assert every.record_shape == every.memory_shape
    first = build(torch.float32, memory_from=1).fingerprint()
    assert build(torch.float32, memory_from=1, memory_heads=HEADS).fingerprint() != first
    for bad, line in (
        ("0.1", "memory_heads 0.1: layers 1 to 3 keep memories, with heads 0 to 1"),
        ("1.2", "memory_heads 1.2: layers 1 to 3"),
        ("1.0,", "'' is no layer.head"),
        ("1", "'1' is no layer.head"),
        ("1.-1", "'1.-1' is no layer.head"),
        ("", "'' is no layer.head"),
    ):
        with pytest.raises(UserError, match=line):
            Config(**tiny, memory_heads=bad)


# ---------------------------------------------------------------------------------------------
# Whole documents (Remark 3.2)

DOCUMENTS = torch.tensor([4, 4, 4, 7, 7, 9])  # of three pieces, of two, of one


def before_rope(model, tokens):
    """Keys and values of one sequence (n,) without header, (Lm, 2, Hkv, n, dh), keys before RoPE:
    caught from a plain forward over header + sequence."""
    c = model.config
    caught = []
    hooks = [
        b.attn.qkv.register_forward_hook(lambda m, x, y: caught.append(y)) for b in model.blocks
    ]
    with torch.no_grad():
        model(torch.cat([torch.tensor(c.header), tokens])[None])
    for hook in hooks:
        hook.remove()
    layers = []
    for l in c.memory_layers:
        x = caught[l][0, 3:].view(len(tokens), 10, 10).transpose(0, 1)  # (H + 2 Hkv, n, dh)
        layers.append(torch.stack([x[6:8], x[8:10]]))
    return torch.stack(layers)


def test_pieces_of_a_document_are_cut_from_one_sequence_and_turned_back(case):
    """Catches pieces that see nothing of their document, kept keys at the document's positions (the
    pool's lie at P, P+1, ...), tokens of the header or of another piece among the kept, and padding
    between pieces."""
    model, _, refs = case
    pool, index = model.write(refs, return_indices=True, documents=DOCUMENTS)
    alone = model.write(refs)
    assert torch.equal(pool.count, alone.count)
    for number in (4, 7, 9):
        rows = (DOCUMENTS == number).nonzero().flatten().tolist()
        document = torch.cat([refs[m, : LENGTHS[m]] for m in rows])
        kv = before_rope(model, document)
        begin = 0
        for m in rows:
            n = LENGTHS[m]
            own = kv[..., begin : begin + n, :]
            cos, sin = rope_table(torch.arange(3, 3 + n), model.config)
            turned = apply_rope(own[:, 0], cos, sin)  # (Lm, Hkv, n, dh)
            filled = int(pool.count[m])
            assert (index[m, ..., :filled] < n).all() and (index[m, ..., filled:] == -1).all()
            at = index[m, ..., :filled, None].expand(-1, -1, -1, 10)  # (Lm, Hkv, filled, dh)
            keys, values = pool.kv[m, ..., :filled, :].unbind(1)
            torch.testing.assert_close(keys, turned.gather(2, at), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(values, own[:, 1].gather(2, at), rtol=1e-10, atol=1e-12)
            begin += n
    for m in (0, 3):  # nothing stands before the first piece
        torch.testing.assert_close(pool.kv[m], alone.kv[m], rtol=1e-10, atol=1e-12)
    for m in (1, 2, 4):
        assert (pool.kv[m] - alone.kv[m]).abs().max() > 0.01


def test_pieces_choose_by_their_own_tokens(case):
    """Catches a choice of tokens by the attention of the whole document, or by turned queries: in
    layer 0, where no token has seen another, a piece keeps what it would keep alone."""
    model, _, refs = case
    if model.config.memory_from:
        pytest.skip("layer 0 writes no memory")
    pool, index = model.write(refs, return_indices=True, documents=DOCUMENTS)
    alone, by_itself = model.write(refs, return_indices=True)
    assert torch.equal(index[:, 0], by_itself[:, 0])
    torch.testing.assert_close(pool.kv[:, 0], alone.kv[:, 0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_of_one_reference_are_references(build, references, dtype):
    """Catches a second way of writing that rounds otherwise, or other positions: every bit."""
    model = build(dtype)
    refs = references([13, 4, 9, 1, 12])
    a = model.write(refs)
    b = model.write(refs, documents=torch.tensor([2, 3, 5, 7, 11]))
    assert torch.equal(a.kv, b.kv) and torch.equal(a.count, b.count)


def test_a_piece_sees_those_before_it_and_no_other(case):
    """Catches a causal mask across documents, or none within one."""
    model, _, refs = case
    pool = model.write(refs, documents=DOCUMENTS)
    other = refs.clone()
    other[1, 0] = (refs[1, 0] + 1) % 90
    changed = model.write(other, documents=DOCUMENTS)
    differs = (changed.kv - pool.kv).abs().amax((1, 2, 3, 4, 5)) > 1e-9
    assert differs.tolist() == [False, True, True, False, False, False]


def test_gradient_reaches_what_stands_before_a_piece(case):
    """Catches pieces that are cut out of the graph: what is written in training is learnt."""
    model, _, refs = case
    pool = model.write(refs, documents=DOCUMENTS)
    pool.kv[2].square().sum().backward()
    seen = model.embed.weight.grad.abs().sum(1) > 0
    assert seen[refs[0, : LENGTHS[0]]].all() and not seen[refs[5, : LENGTHS[5]]].all()


def test_documents_that_cannot_be_are_refused(case, references):
    """Catches a document longer than any position that was trained, and pieces out of order."""
    model, _, refs = case
    with pytest.raises(UserError, match="follow each other"):
        model.write(refs, documents=torch.tensor([1, 1, 2, 1, 3, 3]))
    long = references([13] * 8)
    model.write(long[:7], documents=torch.zeros(7, dtype=torch.int64))
    with pytest.raises(UserError, match="document of 104 tokens; the most at once is 103"):
        model.write(long, documents=torch.zeros(8, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------
# Gradients reach the writer (invariant 8)


def test_gradient_through_memories_is_the_true_one(build, references):
    """Catches a writer that gets no gradient, or a wrong one: the derivative of the loss along a
    random direction of all weights, against a difference quotient. The indices stay as they are."""
    model = build(scale=4.0)
    refs = references(LENGTHS)
    g = torch.Generator().manual_seed(10)
    tokens = torch.randint(0, 90, (2, T), generator=g)
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in model.parameters()]

    def loss():
        pool, index = model.write(refs, return_indices=True)
        logits = model(tokens, memories=pool, recall=RECALL)[0]
        logp = logits[:, :-1].log_softmax(-1)  # in float64; the model's own loss is float32
        return -logp.gather(-1, tokens[:, 1:, None]).mean(), index

    value, index = loss()
    value.backward()
    slope = 0.0
    for p, d in zip(model.parameters(), direction, strict=True):
        slope += (p.grad * d).sum()
    values = []
    eps = 1e-6
    with torch.no_grad():
        for sign in (1, -2):  # to +eps, then to -eps
            for p, d in zip(model.parameters(), direction, strict=True):
                p += sign * eps * d
            value, chosen = loss()
            assert torch.equal(chosen, index)  # the derivative is that of the loss with these
            values.append(value)
    quotient = (values[0] - values[1]) / (2 * eps)
    torch.testing.assert_close(slope, quotient, rtol=1e-5, atol=1e-7)


def test_gradient_reaches_the_writer_only_through_kept_slots(case):
    """Catches detached memories and gradients of empty slots and of memories that nobody reads. A
    token that only a reference has (91) gets a gradient exactly when it is read, and none when the
    memories are detached."""
    model, tokens, refs = case
    refs[4, 7] = 91
    targets = tokens.roll(-1, 1)
    pool = model.write(refs)
    pool.kv.retain_grad()
    model(tokens, targets, pool, RECALL)[1].backward()
    for m, n in enumerate(pool.count.tolist()):
        assert (pool.kv.grad[m, ..., n:, :] == 0).all()
        assert ((pool.kv.grad[m, ..., :n, :] != 0).all()) == (m != 5)
    assert model.embed.weight.grad[91].abs().max() > 1e-8
    assert (model.embed.weight.grad[92] == 0).all()

    model.zero_grad()
    model(tokens, targets, Memories(pool.kv.detach(), pool.count), RECALL)[1].backward()
    assert (model.embed.weight.grad[91] == 0).all()

    model.zero_grad()
    refs[4, 7] = 3
    refs[5, 2] = 91  # in memory 5, which no chunk reads
    model(tokens, targets, model.write(refs), RECALL)[1].backward()
    assert (model.embed.weight.grad[91] == 0).all()


def all_gradients(model, tokens, refs, **options):
    """Logits, loss, memories and every gradient of one step of the explicit stage."""
    model.zero_grad()
    pool, index = model.write(refs, return_indices=True)
    logits, loss = model(tokens, tokens.roll(-1, 1), pool, RECALL, **options)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    return logits, [loss.detach(), pool.kv.detach(), index, *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_layers_give_the_same_bits(build, references, dtype, autocast):
    """Catches a layer that is computed again with another layer's memories or rule (a variable of
    the loop that has moved on), without autocast, or that gives its memories twice."""
    model = build(dtype)
    refs = references(LENGTHS)
    tokens = torch.randint(0, 90, (2, T), generator=torch.Generator().manual_seed(14))
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    results = []
    for model.recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(all_gradients(model, tokens, refs)[1])
    assert len(calls) == 7 + 2 * 7  # 3 layers write, 4 read; then each of them twice
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():  # no gradient: nothing to compute again
        model(tokens)
    assert len(calls) == 7 + 2 * 7 + 4


def rows_kept_for_the_backward(forward):
    """The numbers of rows of the tensors (rows, V) that autograd keeps, weights aside."""
    rows = set()

    def pack(x):
        if x.shape[1:] == (97,) and x.shape[0] != 60:  # (60, 97) is the head's weight, transposed
            rows.add(x.shape[0])
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return rows


def test_the_loss_in_parts_is_the_loss(build, references, monkeypatch):
    """Catches parts that are weighed alike though they have other numbers of targets, a part of
    ignored targets alone (nan), logits that are kept, and a lost last part."""
    model = build(torch.float32, tied=True)
    refs = references(LENGTHS)
    tokens = torch.randint(0, 90, (2, T), generator=torch.Generator().manual_seed(15))
    targets = tokens.roll(-1, 1)
    targets[0, 3:17] = -1  # more than one part of 7
    targets[1, 2] = -1
    pool = model.write(refs)
    logits, want = model(tokens, targets, pool, RECALL)
    want_grads = torch.autograd.grad(want, list(model.parameters()), retain_graph=True)
    assert logits.shape == (2, T, 97)
    for most in (model_module.MOST_LOGITS, 7 * 97, 5):  # one part, 8 parts, token by token
        monkeypatch.setattr(model_module, "MOST_LOGITS", most)
        logits, loss = model(tokens, targets, pool, RECALL, return_logits=False)
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        assert logits is None
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
        for a, b in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
        saved = rows_kept_for_the_backward(lambda: model(tokens, targets, return_logits=False))
        assert max(saved) == (50 if most > 50 * 97 else most // 97 or 1)
        with torch.no_grad():
            _, loss = model(tokens, targets, pool, RECALL, return_logits=False)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)


def test_a_bfloat16_gradient_of_many_parts_is_rounded_once(monkeypatch):
    """Catches the head's gradient summed over the parts in bfloat16: each part that is added to a
    sum of many loses all but the first bits of what it adds."""
    g = torch.Generator().manual_seed(23)
    head = torch.nn.Linear(26, 31, bias=False).bfloat16()
    x = torch.randn(411, 26, generator=g).bfloat16() + 0.5
    targets = torch.randint(0, 5, (411,), generator=g)
    grads = []
    for most in (411 * 31, 31):  # one part, token by token
        monkeypatch.setattr(model_module, "MOST_LOGITS", most)
        loss = model_module.loss_in_parts(head, x, targets)
        grads.append(torch.autograd.grad(loss, head.weight)[0])
    one, many = grads
    assert many.dtype == torch.bfloat16
    error = (many.float() - one.float()).norm() / one.float().norm()
    assert error < 2**-8  # half a step of bfloat16 each; summed in bfloat16 it is ten times that


def test_the_loss_computes_no_gradient_that_nobody_needs(monkeypatch):
    """Catches a frozen head, a frozen body or a validation that pays for gradients all the same."""
    head = torch.nn.Linear(26, 31, bias=False)
    x = torch.randn(50, 26, requires_grad=True)
    targets = torch.arange(50) % 31
    monkeypatch.setattr(model_module, "MOST_LOGITS", 7 * 31)
    product = 2 * 50 * 26 * 31  # FLOPs of the logits, of dx and of dweight: the same each
    for of_x, of_head in ((True, True), (True, False), (False, True), (False, False)):
        x.requires_grad_(of_x)
        head.requires_grad_(of_head)
        needed = [leaf for leaf in (x, head.weight) if leaf.requires_grad]
        with FlopCounterMode(display=False) as counter:
            loss = model_module.loss_in_parts(head, x, targets)
        assert counter.get_total_flops() == (1 + len(needed)) * product
        want = F.cross_entropy(head(x), targets)
        torch.testing.assert_close(loss, want)
        if needed:
            grads = torch.autograd.grad(loss, needed)
            torch.testing.assert_close(grads, torch.autograd.grad(want, needed))
    x.requires_grad_()
    head.requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model_module.loss_in_parts(head, x, targets)
    assert counter.get_total_flops() == product


def test_a_cpu_computes_the_logits_of_a_small_vocabulary_in_its_cache(monkeypatch):
    """Catches parts of a few rows, each of which adds to the gradient of a whole large head; parts
    for the cache of a CPU on a GPU; and a part larger than MOST_LOGITS."""

    def rows(n_vocab, device="cpu"):
        with torch.device("meta"):
            head = torch.nn.Linear(8, n_vocab, bias=False)
        return model_module.rows_at_once(head, torch.device(device))

    assert [rows(n) for n in (4096, 8192, 8193, 60416)] == [256, 128, 2**27 // 8193, 2**27 // 60416]
    assert rows(4096, "cuda") == 2**27 // 4096
    monkeypatch.setattr(model_module, "MOST_LOGITS", 9 * 4096)
    assert rows(4096) == 9 and rows(2**17) == 1


def test_parameters_in_bfloat16_lose_no_more_than_their_rounding(build):
    """Catches norms, rotations, softmax or the loss computed in bfloat16: the model of rounded
    parameters must differ from the same numbers in float64 by what rounding of x and y explains."""
    half = build(torch.bfloat16, scale=2.0)
    exact = build(scale=2.0)
    exact.load_state_dict(half.state_dict())
    tokens = torch.randint(0, 90, (2, T), generator=torch.Generator().manual_seed(16))
    with torch.no_grad():
        (_, loss) = half(tokens, tokens.roll(-1, 1))
        (_, want) = exact(tokens, tokens.roll(-1, 1))
        assert loss.dtype == torch.float32
        assert abs(float(loss - want)) < 0.01 * float(want)
        x = torch.randn(2, 5, 60, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
        norm = half.blocks[1].norm1
        true = exact.blocks[1].norm1
        assert torch.equal(norm(x), true(x.double()).bfloat16())
        cos, sin = model_module.rope_table(torch.tensor([5000, 1, 77, 128, 2000]), half.config)
        x = torch.randn(2, 5, 10, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(2))
        turned = model_module.apply_rope(x.double(), cos.double(), sin.double())
        error = model_module.apply_rope(x, cos, sin).double() - turned
        assert (error.abs() <= turned.abs() * 2**-8 + 1e-6).all()


def test_references_are_no_targets(build, references):
    """Catches references (or the header) in the loss: a token that stands only there is never
    predicted, so the gradient of its output row only pushes it down: softmax minus nothing."""
    model = build()
    refs = references(LENGTHS)
    g = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, 90, (2, T), generator=g)
    refs[refs >= 0] = 92
    pool = model.write(refs)
    logits, loss = model(tokens, tokens.roll(-1, 1), pool, RECALL)
    logits.retain_grad()
    loss.backward()
    for token in (92, *model.config.header):  # p / n > 0 at every place
        assert (logits.grad[..., token] > 0).all()


# ---------------------------------------------------------------------------------------------
# Configs and their numbers (sec. 3.3, 3.4)


def test_numbers_of_the_paper():
    """Catches a drift of the presets: 2.4B non-embedding weights, 22 x 2 x 8 x 8 x 80 a memory."""
    paper = Config.preset("2.4b")
    assert paper == Config()  # the defaults are the paper's
    assert paper.n_params == 2_433_024_000
    assert paper.memory_shape == (22, 2, 8, 8, 80)
    assert 2 * math.prod(paper.memory_shape) == 450_560  # bytes in bfloat16
    assert paper.n_embd == 3200 and len(paper.header) > 1
    middle = Config.preset("0.9b")
    assert middle.n_params == 922_746_880  # the paper rounds to 0.92B
    assert middle.memory_shape == (20, 2, 8, 8, 64)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_counts_itself_right(name):
    """Catches a preset that cannot be built, and a formula that is not the module's own count."""
    config = Config.preset(name)
    with torch.device("meta"):
        model = Memory3(config)
    in_blocks = [p for p in model.blocks.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    assert sum(p.numel() for p in in_blocks) == config.n_params
    assert sum(p.numel() for p in norms) == (2 * config.n_layer + 1) * config.n_embd
    total = sum(p.numel() for p in model.parameters())
    embeddings = (1 if config.tied else 2) * config.vocab_size * config.n_embd
    assert total - config.n_params == embeddings + sum(p.numel() for p in norms)


def test_tied_embeddings_are_one_matrix(build):
    """Catches a tie that init or a copy to another dtype undoes."""
    tied = build(tied=True)
    untied = build()
    assert tied.head.weight is tied.embed.weight
    assert not torch.equal(untied.head.weight, untied.embed.weight)


@pytest.mark.parametrize(
    "changes, line",
    [
        (dict(n_memory_layer=5), "n_memory_layer 5 > n_layer 4"),
        (dict(memory_from=2), "memory_from 2 . n_memory_layer 3 is more than n_layer 4"),
        (dict(n_kv_head=4), "n_head 6 is not a multiple of n_kv_head 4"),
        (dict(head_dim=11), "head_dim 11 is odd"),
        (dict(header=()), "header is empty"),
    ],
)
def test_shapes_that_cannot_be_are_refused_in_one_line(config, changes, line):
    """Catches a shape error deep inside of the first forward."""
    with pytest.raises(ValueError, match=line) as e:
        Config(**{**asdict(config), **changes})
    assert "\n" not in str(e.value)


def test_unknown_names_are_errors():
    """Catches a misspelt preset or config name that is silently ignored."""
    with pytest.raises(ValueError, match="unknown preset '3b'; there are toy, small, 0.9b, 2.4b"):
        Config.preset("3b")
    with pytest.raises(ValueError, match=r"unknown config names \['n_layers'\]"):
        Config.from_dict(dict(n_layers=4))
    assert Config.preset("toy", n_layer=5).n_layer == 5
    assert Config.from_dict(asdict(Config.preset("toy"))) == Config.preset("toy")


# ---------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("header", [True, False])
def test_decoding_through_the_cache_is_the_forward(case, header):
    """Catches keys at another place, one too many or too few of them, a recall that is late or
    leaves something behind, and all that a CUDA graph would repeat wrongly: a buffer that is
    replaced instead of filled, slots that move, junk of an earlier use."""
    model, tokens, refs = case
    addresses = set()
    cache = Cache(model.config, 2, 25, header, torch.float64)
    with torch.no_grad():
        pool = model.write(refs)
        table = RECALL
        for start in (7, 14):  # the second time in the same buffers
            cache.clear()
            recall = table[:, : start // 7] if header else None
            memories = pool if header else None
            out = [model(tokens[:, :start], None, memories, recall, cache)[0][:, 0]]
            for t in range(start, 25):
                if header and t % 7 == 0:
                    cache.load_memories(pool, table[:, t // 7])
                out.append(model.decode(tokens[:, t], cache))
                held = (*cache.kv, cache.valid, cache.length)
                addresses.add(tuple(x.data_ptr() for x in held))
            full = model(tokens, None, memories, table if header else None)[0][:, start - 1 :]
            torch.testing.assert_close(torch.stack(out, 1), full, rtol=1e-9, atol=1e-10)
            assert cache.length.tolist() == [25]
            with pytest.raises(IndexError):  # it is full
                model.decode(tokens[:, 3], cache)
    assert len(addresses) == 1


# aot_eager: all of torch.compile but the generated code, whose C++ takes a minute to compile
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_compiled_is_decoding(build, references, monkeypatch, backend):
    """Catches a compiled step that is another, or one that is compiled once a layer: all layers
    share what precedes the attention and what follows it, once for the prompt, once for a step."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    begin = torch.compile(Block.begin, dynamic=False, backend=backend)
    finish = torch.compile(Block.finish, dynamic=False, backend=backend)
    monkeypatch.setattr(model_module, "fused_parts", lambda: (begin, finish))
    model = build(n_layer=6, memory_from=1)
    refs = references(LENGTHS)
    tokens = torch.randint(0, 90, (2, T), generator=torch.Generator().manual_seed(17))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    outs = []
    with torch.no_grad():
        pool = model.write(refs)
        for fused in (False, True):
            model.fuse(fused)
            cache = Cache(model.config, 2, 25, dtype=torch.float64)
            out = [model(tokens[:, :14], None, pool, RECALL[:, :2], cache)[0][:, 0]]
            for t in range(14, 25):
                if t % 7 == 0:
                    cache.load_memories(pool, RECALL[:, t // 7])
                out.append(model.decode(tokens[:, t], cache))
            outs.append((torch.stack(out), *cache.kv))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("path", ["flash", "cudnn", "kernel"])
def test_the_paths_of_a_gpu_fit_together(monkeypatch, path):
    """Catches shapes, layouts and types that no CPU path minds: writing, a training step, prefill,
    recall and a static decoding step, traced in bfloat16 with tensors that only have a shape."""
    monkeypatch.setattr(memory, "attention_path", lambda *a, **k: (path, "a test"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # there is nothing to check
    c = Config(**{**TINY, "head_dim": 16})
    like = dict(device="meta", dtype=torch.int64)
    with torch.device("meta"):
        model = Memory3(c).bfloat16()
    tokens = torch.zeros(2, T, **like)
    recall = torch.zeros(2, 4, 4, **like)
    pool = model.write(torch.ones(6, 13, **like))
    model(tokens, tokens, pool, recall)[1].backward()
    assert model.blocks[0].attn.qkv.weight.grad.shape == (160, 96)
    cache = Cache(c, 2, 40, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        assert model(tokens, None, pool, recall, cache)[0].shape == (2, 1, 97)
        cache.load_memories(pool, recall[:, 0])
        assert model.decode(tokens[:, 0], cache).shape == (2, 97)


# ---------------------------------------------------------------------------------------------
# Files


def test_fingerprint_names_weights_and_config(build, config):
    """Catches memories of another model that are taken for ours: the smallest change of a weight,
    of the header or of the selection is another fingerprint. The same model built again is not, nor
    are other ways to read: their memories are the same."""
    ours = build(torch.float32)
    first = ours.fingerprint()
    assert len(first) == 16 and first == build(torch.float32).fingerprint()
    with torch.no_grad():
        ours.blocks[2].attn.qkv.weight[5, 7] += 1e-6
    assert ours.fingerprint() != first
    assert build(torch.float32, approximate_weights=True).fingerprint() != first
    assert build(torch.float32, header=(96, 94, 92)).fingerprint() != first
    assert build(torch.float32, selection=2).fingerprint() != first
    assert build(torch.float32, memory_from=1).fingerprint() != first
    reader = dict(n_recall=3, chunk_len=9, max_context=50)
    assert build(torch.float32, **reader).fingerprint() == first


def test_rounded_weights_keep_the_fingerprint(build):
    """Catches a model in bfloat16 that no longer opens its own bank; a model that says it is
    rounded though it was trained on."""
    ours = build(torch.float32)
    first = ours.fingerprint()
    half = build(torch.float32).rounded(torch.bfloat16)
    assert half.embed.weight.dtype == torch.bfloat16 and half.fingerprint() == first
    assert build(torch.float32).bfloat16().fingerprint() != first
    assert half.rounded(torch.float32).fingerprint() == first


def checkpoint(build, path, dtype=torch.float32, **changes):
    """Writes a checkpoint; returns its model."""
    ours = build(dtype, **changes)
    save_checkpoint(path, ours.state_dict(), dict(config=asdict(ours.config), step=3))
    return ours


def test_checkpoint_round_trip(build, tmp_path):
    """Catches a config or a weight that a file loses, a name of the file that matters, bfloat16
    weights that become float32 in memory, and tied embeddings that come apart."""
    for dtype in (torch.float32, torch.bfloat16):
        changes = dict(tied=True, approximate_weights=True)
        ours = checkpoint(build, tmp_path / "model.pt", dtype, **changes)
        shutil.copy(tmp_path / "model.pt", tmp_path / "renamed.pt")
        for path in (tmp_path, str(tmp_path / "model.pt"), tmp_path / "renamed.pt"):
            twin, meta = load_checkpoint(path)
            assert twin.fingerprint() == ours.fingerprint() and meta["step"] == 3
            assert twin.config == ours.config and twin.head.weight is twin.embed.weight
            for name, tensor in ours.state_dict().items():
                there = twin.state_dict()[name]
                assert there.dtype == dtype and torch.equal(there, tensor)
    with pytest.raises(UserError, match="no checkpoint there"):
        load_checkpoint(tmp_path / "other.pt")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are Linux's")
def test_opening_a_checkpoint_takes_its_weights_once(build, tmp_path):
    """Catches a second copy of the weights while they are read, and states of an optimizer that
    are read with them: peaks of an own process, in bytes."""
    shape = dict(vocab_size=20_011, n_head=24, n_kv_head=2, head_dim=32, header=(1,))
    model = build(torch.bfloat16, **shape)
    weights = sum(p.numel() * 2 for p in model.parameters())  # 66 MB
    meta = dict(config=asdict(model.config))
    states = {name: dict(exp_avg=p.detach().float()) for name, p in model.named_parameters()}
    save_checkpoint(tmp_path / "model.pt", model.state_dict(), meta)
    save_checkpoint(tmp_path / "last.pt", model.state_dict(), meta, states)
    checkpoint(build, tmp_path / "small.pt")
    code = """
import re, sys
from model import load_checkpoint

def peak():
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024

load_checkpoint(sys.argv[1])  # what PyTorch itself takes is taken now
before = peak()
load_checkpoint(sys.argv[2])
print(peak() - before)
"""
    for name, most in (("model.pt", 1.25), ("last.pt", 2.25)):  # mapped pages of a file count, too
        command = [sys.executable, "-c", code, tmp_path / "small.pt", tmp_path / name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert 0.9 * weights < int(done.stdout) < most * weights + 2**25, done.stderr


def test_every_flipped_bit_of_a_checkpoint_is_noticed(build, tmp_path):
    """Catches damaged weights that are believed: a bit anywhere in the file, a file cut off
    anywhere, bytes at its end, a file that torch.save wrote without a checksum."""
    checkpoint(build, tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    g = torch.Generator().manual_seed(6)
    bits = torch.randint(8 * len(whole), (250,), generator=g).tolist()
    # the first and the last bytes too: the header of the zip file, the checksum itself
    for bit in [0, 35, 8 * len(whole) - 1, 8 * len(whole) - 111, *bits]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        bad.write_bytes(damaged)
        with pytest.raises(UserError, match=r"bad\.pt: not a checkpoint as train.py wrote it"):
            load_checkpoint(bad)
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 14, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"bad\.pt: not a checkpoint as train.py wrote it"):
            load_checkpoint(bad)
    for data in (whole + b"x", whole[:-14]):
        bad.write_bytes(data)
        with pytest.raises(UserError, match="no checksum at its end"):
            load_checkpoint(bad)
    load_checkpoint(bad, verify=False)  # without its checksum


def test_checkpoint_that_does_not_fit_itself_is_refused(build, tmp_path):
    """Catches a traceback, or gigabytes of memory, for a config and weights of two models, and a
    meta.json of another run beside a model.pt."""
    ours = build(torch.float32)
    config = asdict(ours.config)
    path = tmp_path / "model.pt"
    for changes, line in (
        (dict(n_layer=10**6), "n_layer 1000000: give a whole number from 1 to 1,000"),
        (dict(mlp_width=2**20), "do not fit"),
        (dict(n_layer=5), "do not fit"),
        (dict(n_layer="many"), "n_layer many: give a whole number"),
        (dict(depth=3), "unknown config names"),
    ):
        save_checkpoint(path, ours.state_dict(), dict(config=config | changes, step=3))
        with pytest.raises(UserError, match=line) as error:
            load_checkpoint(path)
        assert "model.pt" in str(error.value) and "\n" not in str(error.value)
    other = tmp_path / "other"
    other.mkdir()
    checkpoint(build, path)
    checkpoint(build, other / "model.pt", seed=4)
    shutil.copy(other / "model.pt", path)
    with pytest.raises(UserError, match="meta.json is not that of .*model.pt: take both"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_that_could_not_be_written_leaves_the_old_one(build, tmp_path, monkeypatch):
    """Catches a disk that is full in a save: weights without their meta.json, half a file."""
    ours = checkpoint(build, tmp_path / "model.pt")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"model.pt", "meta.json"}

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="model.pt cannot be written: No space left"):
        save_checkpoint(tmp_path / "model.pt", ours.state_dict(), dict(config=asdict(ours.config)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_is_opened_in_any_mode(build, tmp_path):
    """Catches weights of PyTorch's inference mode, of which no change is counted."""
    ours = checkpoint(build, tmp_path / "model.pt")
    with torch.inference_mode():
        model, _ = load_checkpoint(tmp_path)
        assert model.fingerprint() == ours.fingerprint()
    model(torch.tensor([[96, 5, 7]]), torch.tensor([[5, 7, 9]]))[1].backward()  # it can learn


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_neither_written_nor_read(build, tmp_path, number):
    """Catches nan that is saved over a good checkpoint, or believed: memories of nan, answers of
    NUL bytes."""
    ours = checkpoint(build, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    with torch.no_grad():
        ours.blocks[1].mlp.down.weight[3, 5] = number
    weights = ours.state_dict()
    meta = dict(config=asdict(ours.config))
    with pytest.raises(UserError, match="model.pt: weight blocks.1.mlp.down.weight holds nan or"):
        save_checkpoint(tmp_path / "model.pt", weights, meta)
    assert (tmp_path / "model.pt").read_bytes() == before
    with pytest.MonkeyPatch.context() as patch:  # as another program could have written it
        patch.setattr(model_module, "check_finite", lambda weights, file: None)
        save_checkpoint(tmp_path / "model.pt", weights, meta)
    with pytest.raises(UserError, match="model.pt: weight blocks.1.mlp.down.weight holds nan or"):
        load_checkpoint(tmp_path)


def in_place(model, other):
    with torch.no_grad():
        model.norm.weight[3] += 1e-6


def by_optimizer(model, other):
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    torch.optim.AdamW([model.norm.weight], fused=True).step()


def by_optimizer_that_is_gone(model, other):
    by_optimizer(model, other)
    model.norm.weight.grad = None


def loaded(model, other):
    model.load_state_dict(other.state_dict())


def assigned(model, other):
    model.load_state_dict(other.state_dict(), assign=True)


def doubled(model, other):
    model.blocks[1].mlp.down.weight.data.mul_(2)


def given_data(model, other):
    model.norm.weight.data = model.norm.weight.data + 1


def rounded(model, other):
    model.to(torch.bfloat16)


def rounded_and_back(model, other):
    model.bfloat16().float()


def copied(model, other):
    model.norm.weight = torch.nn.Parameter(2 * model.norm.weight.detach())


CHANGES = (in_place, by_optimizer, by_optimizer_that_is_gone, loaded, assigned, doubled)
CHANGES += (given_data, rounded, rounded_and_back, copied)


@pytest.mark.parametrize("change", CHANGES)
def test_a_loaded_model_that_changes_gets_another_fingerprint(build, tmp_path, monkeypatch, change):
    """Catches an identity that is hashed again at every opening (minutes for billions of weights),
    or that stays when the weights are others: new memories would be filed under another writer."""
    first = checkpoint(build, tmp_path / "model.pt").fingerprint()
    twin = load_checkpoint(tmp_path)[0]
    with monkeypatch.context() as patch:
        patch.delattr(model_module, "hash_weights")
        assert twin.fingerprint() == first
        # as for another device: other memory, the same numbers
        assert twin._apply(torch.clone).eval().fingerprint() == first
    change(twin, build(torch.float32, seed=4))
    assert twin.fingerprint() != first
    assert twin.fingerprint() == same_weights(build, twin).fingerprint()


def same_weights(build, model):
    """A new model with the weights of another, of which no hash is known."""
    new = build(model.embed.weight.dtype)
    new.load_state_dict(model.state_dict())
    return new


def test_what_a_fingerprint_does_not_notice_is_told_to_it(build, tmp_path):
    """Catches a keep_hash(None) that does not help where a number is changed behind PyTorch's
    back, which no fingerprint short of minutes can notice."""
    first = checkpoint(build, tmp_path / "model.pt").fingerprint()
    twin = load_checkpoint(tmp_path)[0]
    twin.embed.weight.data[1, 1] += 1
    assert twin.fingerprint() == first
    twin.keep_hash(None)
    assert twin.fingerprint() != first


def test_worked_examples():
    """Catches a docstring that shows what the code no longer does."""
    result = doctest.testmod(model_module)
    assert result.attempted > 0 and result.failed == 0


def test_legend_names_what_the_config_holds():
    """Catches a legend at the top of model.py that rots: its numbers are the defaults."""
    legend = model_module.__doc__
    c = Config()
    for words in (
        f"C chunk_len {c.chunk_len}",
        f"R n_recall {c.n_recall}",
        f"S memory_tokens {c.memory_tokens}",
    ):
        assert words in legend
