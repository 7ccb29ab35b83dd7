"""Writing and reading explicit memories: the choice of tokens (sec. 3.3) and chunk attention.

Two oracles for the reading, in plain autograd: one concatenates the whole pool with the sequence
and masks it, the other walks over the chunks. The bank on disk has tests of its own.
"""

import doctest
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import kernels
import memory
from common import UserError
from memory import Memories, chunk_attention, select_tokens, token_weights
from quantize import Codec

# ---------------------------------------------------------------------------------------------
# Writing


def brute_weights(q, k, mask, approximate=False):
    """Sec. 3.3 as it is printed: one reference, one head, one pair of tokens at a time.

    approximate: the logarithm of the weights, since exp may overflow."""
    N, H, n, dh = q.shape
    Hkv = k.shape[1]
    w = [[[0.0] * n for _ in range(Hkv)] for _ in range(N)]
    logs = [[[[] for _ in range(n)] for _ in range(Hkv)] for _ in range(N)]
    for b in range(N):
        real = [j for j in range(n) if mask[b, j]]
        for h in range(H):
            kv = h // (H // Hkv)
            for i in real:
                a = {j: float(q[b, h, i] @ k[b, kv, j]) / math.sqrt(dh) for j in real}
                top = max(a.values())
                z = sum(math.exp(x - top) for x in a.values())
                for j in real:
                    w[b][kv][j] += math.exp(a[j] - top) / z
                    logs[b][kv][j].append(a[j])
    if not approximate:
        return torch.tensor(w)
    logs = [[[torch.tensor(x or [-math.inf]).logsumexp(0) for x in y] for y in z] for z in logs]
    return torch.stack([torch.stack([torch.stack(y) for y in z]) for z in logs])


def writing_case(scale=1.0):
    """3 references of 9, 4 and 1 tokens, 6 query heads on 2 key-value heads, 11 columns."""
    g = torch.Generator().manual_seed(1)
    q = torch.randn(3, 6, 11, 10, generator=g) * scale
    k = torch.randn(3, 2, 11, 10, generator=g) * scale
    mask = torch.arange(11) < torch.tensor([9, 4, 1])[:, None]
    return q, k, mask


def test_token_weights_equal_the_formula_token_by_token():
    """Catches a wrong sqrt, a causal mask, a sum over the wrong axis, heads in the wrong group, and
    padding that asks (i) or is asked (j)."""
    q, k, mask = writing_case()
    w = token_weights(q, k, mask)
    assert w.shape == (3, 2, 11) and w.dtype == torch.float32
    torch.testing.assert_close(w, brute_weights(q, k, mask), rtol=1e-5, atol=1e-6)
    # each of (3 query heads x tokens) rows gives away exactly 1
    assert w.sum(-1).allclose(3.0 * mask.sum(1)[:, None])
    assert (w.masked_select(~mask[:, None].expand_as(w)) == 0).all()


@pytest.mark.parametrize("scale", [1.0, 4.0, 30.0])
def test_approximate_weights_keep_the_order_and_do_not_overflow(scale):
    """Catches exp of a raw score (inf from 89 on), a shift per row (which is the softmax again),
    and inf * 0 = nan where a padding token scores higher than every real one."""
    q, k, mask = writing_case(scale)
    q[:, :, 9:] *= 50  # padding has queries too; they must neither count nor overflow
    w = token_weights(q, k, mask, approximate=True)
    assert w.isfinite().all() and (w >= 0).all()
    logs = brute_weights(q, k, mask, approximate=True)
    assert (w.masked_select(~mask[:, None].expand_as(w)) == 0).all()
    for b in range(3):
        for h in range(2):
            weights = w[b, h][mask[b]]
            log_of_max = (weights / weights.max()).log()
            true = logs[b, h][mask[b]]
            true = true - true.max()
            shown = weights > 0  # what is e^-100 of the largest is 0 in float32
            torch.testing.assert_close(log_of_max[shown], true[shown], rtol=1e-4, atol=1e-3)
            assert (true[~shown] < -87).all()


def test_approximate_and_exact_weights_are_not_the_same_thing():
    """Catches a flag that is accepted and dropped."""
    q, k, mask = writing_case(2.0)
    exact, approximate = (token_weights(q, k, mask, a) for a in (False, True))
    assert not torch.equal(select_tokens(exact, mask, 3), select_tokens(approximate, mask, 3))


def test_token_weights_sum_in_float32():
    """Catches sums in bfloat16, which would change a fifth of the choices."""
    q, k, mask = (x.bfloat16() if x.is_floating_point() else x for x in writing_case())
    w = token_weights(q, k, mask)
    assert w.dtype == torch.float32
    assert torch.equal(w, token_weights(q.float(), k.float(), mask))


@pytest.mark.parametrize("approximate", [False, True])
def test_autocast_does_not_round_the_weights(approximate):
    """Catches training that chooses other tokens than writing does: under autocast even a product
    of float32 numbers is rounded to bfloat16, and the shift of approximate weights overflows."""
    torch.manual_seed(5)
    q = torch.randn(3, 6, 11, 8).bfloat16()
    k = torch.randn(3, 2, 11, 8).bfloat16()
    mask = torch.arange(11) < torch.tensor([[11], [7], [0]])
    want = memory.token_weights(q, k, mask, approximate)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(memory.token_weights(q, k, mask, approximate), want)


def test_a_reference_of_padding_alone_has_no_weights():
    """Catches nan from a softmax over nothing."""
    q, k, mask = writing_case()
    mask = mask.clone()
    mask[1] = False
    for approximate in (False, True):
        w = token_weights(q, k, mask, approximate)
        assert w.isfinite().all() and (w[1] == 0).all() and (w[0, :, :9] > 0).all()
        assert (select_tokens(w, mask, 3)[1] == -1).all()


def test_the_place_of_a_token_does_not_change_its_weight():
    """Catches a causal mask or positions in the choice: a permuted reference keeps its tokens."""
    q, k, _ = writing_case()
    mask = torch.ones(3, 11, dtype=bool)
    order = torch.tensor([7, 2, 9, 0, 10, 5, 1, 3, 8, 6, 4])
    w = token_weights(q, k, mask)
    moved = token_weights(q[:, :, order], k[:, :, order], mask)
    torch.testing.assert_close(w[..., order], moved, rtol=1e-5, atol=1e-6)


def test_select_tokens_equals_sorting_by_hand():
    """Catches an unstable sort (ties go to the lower index), descending order, kept padding."""
    g = torch.Generator().manual_seed(2)
    weights = torch.randint(0, 4, (5, 3, 11), generator=g).float()  # many ties
    lengths = [11, 9, 4, 2, 1]
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    for s in (1, 4, 7, 13):
        index = select_tokens(weights, mask, s)
        assert index.shape == (5, 3, s) and index.dtype == torch.int64
        for b, n in enumerate(lengths):
            for h in range(3):
                best = sorted(range(n), key=lambda j: (-weights[b, h, j], j))[:s]
                assert index[b, h].tolist() == sorted(best) + [-1] * (s - len(best))


def test_select_tokens_keeps_real_tokens_of_weight_zero_before_padding():
    """Catches padding that wins a tie at zero: a mask with a hole in it, all weights equal."""
    mask = torch.tensor([[False, True, False, True, True, False, True]])
    zeros = torch.zeros(1, 2, 7)
    assert select_tokens(zeros, mask, 3).tolist() == [[[1, 3, 4], [1, 3, 4]]]
    assert select_tokens(zeros, mask, 5).tolist() == [[[1, 3, 4, 6, -1], [1, 3, 4, 6, -1]]]


# ---------------------------------------------------------------------------------------------
# Reading

P = 5
C = 7
S = 3


def reading_case(H=6, Hkv=3, dh=10, T=25, dtype=torch.float64, scale=1.0):
    """2 sequences of 25 tokens = 3 full chunks and 4 tokens; a pool of 9, some of them short."""
    g = torch.Generator().manual_seed(4)

    def random(*shape):
        x = torch.randn(*shape, generator=g, dtype=torch.float64) * scale
        return x.to(dtype).requires_grad_()

    q = random(2, H, P + T, dh)
    k = random(2, Hkv, P + T, dh)
    v = random(2, Hkv, P + T, dh)
    mem_k = random(9, Hkv, S, dh)
    mem_v = random(9, Hkv, S, dh)
    count = torch.tensor([3, 2, 3, 1, 3, 0, 3, 3, 2])
    recall = torch.tensor(
        [
            [[0, 3, -1, 8], [-1, -1, -1, -1], [3, 0, 1, 2], [8, -1, 3, 5]],  # 3 in three chunks
            [[-1, 4, -1, 0], [0, 1, 3, 4], [5, -1, -1, -1], [-1, 2, 1, 4]],  # 5 is empty: count 0
        ]
    )
    recall = recall[:, : math.ceil(T / C)]
    weight = torch.randn(2, H, P + T, dh, generator=g, dtype=torch.float64)  # of the outputs
    return (q, k, v, mem_k, mem_v), count, recall, weight.to(dtype)


def concatenate_and_mask(q, k, v, mem_k, mem_v, count, recall):
    """The whole pool in front of every sequence, and a mask of who may see what."""
    B, H, n, dh = q.shape
    M, Hkv = mem_k.shape[:2]
    mask = torch.zeros(B, n, M * S + n, dtype=bool)
    mask[:, :, M * S :] = torch.ones(n, n, dtype=bool).tril()
    for b in range(B):
        for t in range(n - P):
            for m in recall[b, t // C].tolist():
                if m >= 0:
                    mask[b, P + t, m * S : m * S + int(count[m])] = True

    def keys(pool, x):  # (B, H, M*S + n, dh)
        pool = pool.transpose(0, 1).reshape(1, Hkv, M * S, dh).expand(B, -1, -1, -1)
        return torch.cat([pool, x], 2).repeat_interleave(H // Hkv, 1)

    scores = q @ keys(mem_k, k).mT / math.sqrt(dh)
    return scores.masked_fill(~mask[:, None], -math.inf).softmax(-1) @ keys(mem_v, v)


def loop_over_chunks(q, k, v, mem_k, mem_v, count, recall):
    """One chunk and one head at a time: [its memories | header | context so far]."""
    B, H, n, dh = q.shape
    rows = []
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            header = (x[None, b, i, :P] for x, i in ((q, h), (k, g), (v, g)))
            out = [F.scaled_dot_product_attention(*header, is_causal=True)[0]]
            for c in range(recall.shape[1]):
                a = P + c * C
                z = min(P + (c + 1) * C, n)
                keys = [k[b, g, :z]]
                values = [v[b, g, :z]]
                for m in recall[b, c].tolist():
                    if m >= 0:
                        keys.insert(0, mem_k[m, g, : count[m]])
                        values.insert(0, mem_v[m, g, : count[m]])
                ks = torch.cat(keys)
                vs = torch.cat(values)
                scores = q[b, h, a:z] @ ks.T / math.sqrt(dh)
                late = torch.arange(z) > torch.arange(a, z)[:, None]
                late = F.pad(late, (len(ks) - z, 0))  # no memory is late
                out.append(scores.masked_fill(late, -math.inf).softmax(-1) @ vs)
            rows.append(torch.cat(out))
    return torch.stack(rows).view(B, H, n, dh)


def with_gradients(f, tensors, weight):
    out = f(*tensors)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)]


SHAPES = dict(
    gqa=dict(H=6, Hkv=3, dh=10, T=25),
    one_kv_head_dh80=dict(H=4, Hkv=1, dh=80, T=22),
    mha_full_chunks=dict(H=5, Hkv=5, dh=6, T=28),
    less_than_a_chunk=dict(H=4, Hkv=2, dh=14, T=3),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}
NAMES = "out q k v mem_k mem_v".split()


def apart(q, k, v, mem_k, mem_v):
    """The same numbers, in the strides that the model's own tensors have: the heads of a token are
    neighbours, with other heads behind them, and memories have other layers between them."""
    rows = []
    for x in (q, k, v):
        wide = torch.cat([x, x.flip(1)], 1).transpose(1, 2).contiguous()  # (B, n, 2 H, dh)
        rows.append(wide.transpose(1, 2)[:, : x.shape[1]])
    return *rows, *(torch.stack([x, x], 1)[:, 0] for x in (mem_k, mem_v))


def half_against_float64(heads, path, device, strided):
    """The relative errors of one path in bfloat16: the output's and each gradient's."""
    H, Hkv, dh = heads
    tensors, count, recall, weight = reading_case(H, Hkv, dh, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    oracle = partial(concatenate_and_mask, count=count, recall=recall)
    want = with_gradients(oracle, exact, weight.double())
    there = [x.detach().to(device).requires_grad_() for x in tensors]
    table = count.to(device), recall.to(device)

    def merged(*x):
        return chunk_attention(*(apart(*x) if strided else x), *table, C, P, path=path)

    got = with_gradients(merged, there, weight.to(device))
    errors = {}
    for name, a, b in zip(NAMES, got, want, strict=True):
        errors[name] = float((a.double().cpu() - b).norm() / b.norm())
    return errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("path", ["flash", "cudnn", "kernel"])
@pytest.mark.parametrize("heads", [(6, 3, 80), (8, 1, 64), (5, 5, 32)])
@pytest.mark.parametrize("strided", [False, True])
def test_chunk_attention_on_a_gpu(heads, path, strided):
    """Catches a fused attention whose lse is not the natural logarithm or lies otherwise, or whose
    backward does not take the merged one: each path in bfloat16 against float64 on the CPU."""
    if path == "cudnn" and memory.fused_on_cuda(torch.device("cuda")) != "cudnn":
        pytest.skip("cuDNN's attention is for Hopper and later")
    if path == "kernel" and not kernels.available("cuda")[0]:
        pytest.skip(kernels.available("cuda")[1])
    errors = half_against_float64(heads, path, "cuda", strided)
    assert max(errors.values()) < 1e-2, errors


@pytest.mark.parametrize("strided", [False, True])
def test_chunk_attention_through_the_kernels(emulator, strided):
    """Catches kernels that are given rows elsewhere than they lie, or gradients of others."""
    errors = half_against_float64((6, 3, 16), "kernel", "cpu", strided)
    assert max(errors.values()) < 1e-2, errors


@pytest.mark.parametrize("path", ["math", "cpu-flash"])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunk_attention_equals_both_oracles_and_so_do_its_gradients(shape, path):
    """Catches an lse that is not merged in the backward, memories seen by the header or by another
    chunk, -1 read as the last memory, miscounted slots, a lost last chunk, wrong head groups."""
    tensors, count, recall, weight = reading_case(**SHAPES[shape])

    def merged(*x):
        return chunk_attention(*x, count, recall, C, P, path=path)

    got = with_gradients(merged, tensors, weight)
    for oracle in (concatenate_and_mask, loop_over_chunks):
        want = with_gradients(partial(oracle, count=count, recall=recall), tensors, weight)
        for name, a, b in zip(NAMES, got, want, strict=True):
            error = float((a - b).abs().max())
            assert error < 1e-12, (oracle.__name__, name, error)


@pytest.mark.parametrize("path", ["math", "cpu-flash"])
def test_heads_may_differ_in_what_they_keep(path):
    """Catches counts (M, Hkv) of another head, or of a query head: each key-value head alone, with
    its own column of counts, must give its part of the outputs and of all gradients."""
    tensors, _, recall, weight = reading_case()
    count = torch.randint(0, S + 1, (9, 3), generator=torch.Generator().manual_seed(22))
    count[4] = 0

    def merged(*x):
        return chunk_attention(*x, count, recall, C, P, path=path)

    def head_by_head(q, *rest):
        outs = []
        for h in range(3):
            one = [x[:, h : h + 1] for x in rest]
            queries = q[:, 2 * h : 2 * h + 2]
            outs.append(concatenate_and_mask(queries, *one, count[:, h], recall))
        return torch.cat(outs, 1)

    got = with_gradients(merged, tensors, weight)
    want = with_gradients(head_by_head, tensors, weight)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert float((a - b).abs().max()) < 1e-12, name


@pytest.mark.parametrize("path", ["math", "cpu-flash"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", ["gqa", "one_kv_head_dh80"])
def test_chunk_attention_in_each_precision(shape, dtype, path):
    """Catches sums and lse in bfloat16. The error is measured against float64, relative to the
    largest number of each tensor."""
    tensors, count, recall, weight = reading_case(**SHAPES[shape], dtype=dtype)

    def merged(*x):
        return chunk_attention(*x, count, recall, C, P, path=path)

    got = with_gradients(merged, tensors, weight)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want = with_gradients(
        lambda *x: concatenate_and_mask(*x, count, recall), exact, weight.double()
    )
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == dtype
        error = float((a.double() - b).abs().max() / b.abs().max())
        assert error < TOLERANCE[dtype], (name, error)


@pytest.mark.parametrize("path", ["math", "cpu-flash"])
def test_large_scores_do_not_overflow(path):
    """Catches exp of a score that is not shifted: q . k of several hundred."""
    tensors, count, recall, weight = reading_case(scale=14.0)
    got = with_gradients(
        lambda *x: chunk_attention(*x, count, recall, C, P, path=path), tensors, weight
    )
    want = with_gradients(lambda *x: concatenate_and_mask(*x, count, recall), tensors, weight)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ["math", "cpu-flash"])
def test_order_unused_slots_and_unnamed_memories_change_nothing(path):
    """Catches memories that depend on their place in the table, zeros of empty slots that take a
    share of the softmax, and pool rows that leak into sequences that never named them."""
    tensors, count, recall, weight = reading_case()

    def run(tensors, recall):
        return with_gradients(
            lambda *x: chunk_attention(*x, count, recall, C, P, path=path), tensors, weight
        )

    before = run(tensors, recall)
    moved = run(tensors, recall.flip(-1))
    for a, b in zip(before, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)

    unused = torch.arange(S) >= count[:, None]  # (M, S)
    unused[[6, 7]] = True  # in no table
    assert not {6, 7} & set(recall.flatten().tolist())
    poisoned = [x.detach().clone() for x in tensors]
    for x in poisoned[3:]:
        x.transpose(1, 2)[unused] = 1e6
    after = run([x.requires_grad_() for x in poisoned], recall)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    for grad in after[4:]:
        assert (grad.transpose(1, 2)[unused] == 0).all()
        assert (grad.transpose(1, 2)[~unused] != 0).any()


@pytest.mark.parametrize("path", ["math", "cpu-flash"])
def test_a_table_of_nothing_is_the_plain_decoder(path):
    """Catches lse 0 of an empty row (it must be -inf): all -1, only empty memories, R = 0, an empty
    pool and no table are all ordinary causal attention."""
    (q, k, v, mem_k, mem_v), count, recall, _ = reading_case()
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    nothing = torch.full_like(recall, -1)
    only_empty = torch.where(recall == 5, 5, -1)  # memory 5 has no slot filled
    pool = (mem_k, mem_v, count)
    empty_pool = (mem_k[:0], mem_v[:0], count[:0])
    cases = [
        (pool, nothing),
        (pool, only_empty),
        (pool, nothing[:, :, :0]),
        (empty_pool, nothing),
    ]
    for memories, table in cases:
        out = chunk_attention(q, k, v, *memories, table, C, P, path=path)
        torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)


def test_the_choice_of_a_path_says_why(monkeypatch):
    """Catches a path that cannot run there or is slow there, and a path without its reason."""
    cpu = torch.device("cpu")
    cuda = torch.device("cuda")
    bf16 = torch.bfloat16
    f32 = torch.float32
    f64 = torch.float64
    for dtype, few in ((bf16, 512), (f32, 63), (f64, 63)):  # measured: see attention_path
        for n, want in ((1, "math"), (few, "math"), (few + 1, "cpu-flash"), (2048, "cpu-flash")):
            name, why = memory.attention_path(cpu, dtype, n, 80, 5, 40)
            assert name == want and len(why) > 10
    monkeypatch.setattr(memory, "fused_on_cuda", lambda device: "flash")
    for there in (True, False):
        monkeypatch.setattr(kernels, "available", lambda _, there=there: (there, "because"))
        for *sizes, want in [
            (bf16, 80, 5, 40, "kernel"),
            (bf16, 80, 5, 0, "flash"),  # no memories
            (torch.float16, 80, 5, 40, "flash"),
            (bf16, 72, 5, 40, "flash"),  # kernels.cu wants multiples of 16,
            (bf16, 80, 5, 129, "flash"),  # at most 128 keys,
            (bf16, 80, 17, 40, "flash"),  # and 16 query heads on one
            (bf16, 10, 5, 40, "math"),  # flash attention wants multiples of 8
            (f32, 80, 5, 40, "math"),
        ]:
            dtype, *sizes = sizes
            name, why = memory.attention_path(cuda, dtype, 100, *sizes)
            assert name == (want if there or want == "math" else "flash") and len(why) > 6


def through_kernels(monkeypatch):
    """Makes "kernel" the path of the CPU too, kernels.cu played by the code of memory.py."""
    calls = []
    forward = memory.memory_attention
    backward = memory.memory_attention_backward

    def played(name, f):
        monkeypatch.setattr(kernels, name, lambda *a: calls.append(name) or f(*a))

    def select(q, k, mask, s, approximate):
        weights = token_weights(q, k, mask, approximate)
        return weights, select_tokens(weights, mask, s)

    monkeypatch.setattr(memory, "runs_kernel", lambda *a, **k: True)
    played("memory_attention", forward)
    played("memory_attention_backward", backward)
    played("select", select)
    played("decode_attention", lambda *a: a)
    return calls


def test_the_kernels_are_given_what_the_paths_in_pytorch_get(monkeypatch):
    """Catches arguments of a kernel in another order, a lost gradient, a causal part that is not
    there: on no other machine than one with a GPU would it show."""
    tensors, count, recall, weight = reading_case(dtype=torch.bfloat16)

    def run(path):
        return with_gradients(
            lambda *x: chunk_attention(*x, count, recall, C, P, path=path), tensors, weight
        )

    want = run("cpu-flash")
    calls = through_kernels(monkeypatch)
    for a, b in zip(run("kernel"), want, strict=True):
        assert torch.equal(a, b)
    assert calls == ["memory_attention", "memory_attention_backward"]
    q, k, mask = writing_case()
    kept = memory.keep_tokens(q, k, mask, 4)
    assert torch.equal(kept, select_tokens(token_weights(q, k, mask), mask, 4))
    assert calls[2:] == ["select"]


def test_a_changed_rule_is_not_overridden(monkeypatch):
    """Catches a fork whose rule runs on a CPU only, since on CUDA kernels.cu still chooses by its
    own; and a rule that nobody has written yet, taken for the paper's."""
    calls = through_kernels(monkeypatch)
    q, k, mask = writing_case()
    monkeypatch.setattr(kernels, "SELECTION", 2)  # as if kernels.cu had another rule than memory.py
    index = memory.keep_tokens(q, k, mask, 4)
    assert calls == [] and torch.equal(index, select_tokens(token_weights(q, k, mask), mask, 4))
    with pytest.raises(UserError, match="selection 2: memory.keep_tokens knows only rule 1"):
        memory.keep_tokens(q, k, mask, 4, selection=2)


def test_rule_1_keeps_what_it_kept():
    """Catches a rule that was changed under its old number: banks written by the old rule would be
    taken for the new one's, and kernels.cu would still choose by the old. Give it a new number."""
    g = torch.Generator().manual_seed(21)
    q = torch.randn(2, 6, 9, 4, generator=g)
    k = torch.randn(2, 2, 9, 4, generator=g)
    mask = torch.arange(9) < torch.tensor([[9], [7]])
    for approximate in (False, True):
        weights = brute_weights(q, k, mask, approximate)
        best = weights.masked_fill(~mask[:, None], -math.inf).topk(3).indices.sort().values
        assert torch.equal(memory.keep_tokens(q, k, mask, 3, approximate, 1), best)


def decoding_case(slots=7, room=17, first=3, n=13):
    """One token of 3 sequences over 13 keys there, of room for 17; junk where nothing is."""
    g = torch.Generator().manual_seed(12)
    q = torch.randn(3, 6, 10, generator=g, dtype=torch.float64)
    keys, values = torch.randn(2, 3, 2, room, 10, generator=g, dtype=torch.float64)
    keys[:, :, n - 1 :] = 1e3
    values[:, :, n - 1 :] = 1e3  # the last one comes only now
    valid = torch.rand(3, 2, slots, generator=g) < 0.6
    valid[1] = False  # recalled nothing
    keys[:, :, first : first + slots][~valid] = 1e3
    new_k, new_v = torch.randn(2, 3, 2, 10, generator=g, dtype=torch.float64)
    return q, new_k, new_v, keys, values, valid, n, first


@pytest.mark.parametrize(("slots", "room"), [(7, 17), (0, 17), (7, 29)])
def test_decoding_is_a_softmax_over_the_keys_that_count(slots, room):
    """Catches slots read though empty, keys beyond the length, wrong groups of heads, a new token
    that does not attend itself or overwrites another's keys; in buffers nearly full, and in such
    as a CPU cuts, more than half empty."""
    q, k, v, keys, values, valid, n, first = decoding_case(slots, room)
    cache = keys.clone(), values.clone()
    keys[:, :, n - 1] = k
    values[:, :, n - 1] = v
    want = torch.empty_like(q)
    for b in range(3):
        for h in range(6):
            seen = valid[b, h // 3]
            real = [i for i in range(n) if not first <= i < first + slots or seen[i - first]]
            p = (keys[b, h // 3, real] @ q[b, h] / math.sqrt(10)).softmax(0)
            want[b, h] = p @ values[b, h // 3, real]
    out = memory.decode_attention(q, k, v, *cache, valid, torch.tensor([n]), first)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-13)
    assert torch.equal(cache[0], keys) and torch.equal(cache[1], values)


def test_decoding_through_the_kernel_gets_the_same(monkeypatch):
    """Catches a kernel that is given a layout it does not take, or another count of slots."""
    q, k, v, keys, values, valid, n, first = decoding_case()
    wide = torch.cat([q, q], 1)[:, :6]  # a part of the projection: the kernel takes it as it is
    spread = torch.stack([k, k], 2)[:, :, 0]  # heads apart: it does not
    assert not wide.is_contiguous() and not spread[0].is_contiguous()
    calls = through_kernels(monkeypatch)
    length = torch.tensor([n])
    given = memory.decode_attention(wide, spread, v, keys, values, valid, length, first)
    assert calls == ["decode_attention"] and given[0] is wide
    assert given[1].is_contiguous() and torch.equal(given[1], k)
    rest = (v, keys, values, valid, length)
    assert all(x is y for x, y in zip(given[2:7], rest, strict=True))
    assert given[7:] == (first, valid.shape[2])


def test_codes_and_numbers_fill_the_same_slots(monkeypatch):
    """Catches memories written to a neighbour's slots, over the header or the context, and codes
    that end up elsewhere than the numbers they stand for."""
    g = torch.Generator().manual_seed(13)
    vectors = torch.randn(2000, 10, generator=g)
    codec = Codec.train(vectors, "Residual2x4,PQ5x4")
    kv = torch.randn(4, 3, 2, 2, 5, 10, generator=g)  # M, Lm, 2, Hkv, S, dh
    codes = codec.encode(kv)
    count = torch.tensor([5, 5, 2, 5])
    table = torch.tensor([[2, -1, 0], [3, 3, 1]])
    plain, coded = torch.zeros(2, 3, 2, 2, 2, 29, 10)
    memory.fill_slots(plain, Memories(codec.decode(codes), count), table, 6)
    memory.fill_slots(coded, Memories(codes, count), table, 6, codec)
    assert torch.equal(plain, coded) and (plain[:, :, :, :, :6] == 0).all()
    assert (plain[:, :, :, :, 21:] == 0).all()
    for b, r in ((0, 0), (0, 2), (1, 0), (1, 1), (1, 2)):
        want = codec.decode(codes[table[b, r]])
        assert torch.equal(plain[:, :, b, :, 6 + 5 * r : 11 + 5 * r], want)
    seen = []
    monkeypatch.setattr(memory, "runs_kernel", lambda *a: True)
    monkeypatch.setattr(kernels, "decode_codes", lambda *a: seen.append(a))
    memory.fill_slots(coded, Memories(codes, count), table.T.contiguous().T, 6, codec)
    ((kv, given, rows, fields, where, first),) = seen
    assert kv is coded and given is codes and rows is codec.table and first == 6
    assert where.is_contiguous() and torch.equal(where, table)
    sizes = [1 << bits for _, bits in codec.fields]
    want = [[*f, sum(sizes[:i])] for i, f in enumerate(codec.fields)]
    assert fields.dtype == torch.int32 and fields.tolist() == want


def test_chunk_attention_by_its_own_choice_equals_the_forced_paths():
    """Catches a default path that the tests above never reach."""
    tensors, count, recall, _ = reading_case()
    outs = [
        chunk_attention(*tensors, count, recall, C, P, path=p) for p in (None, "math", "cpu-flash")
    ]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-12, atol=1e-12)


def test_causal_attention_is_the_same_on_both_sides_of_its_threshold():
    """Catches a plain product that differs from the fused attention: 64 tokens take the other."""
    g = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, h, 64, 6, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    long = memory.causal_attention(q, k, v)
    short = memory.causal_attention(*(x[:, :, :63] for x in (q, k, v)))
    torch.testing.assert_close(long[:, :, :63], short, rtol=1e-11, atol=1e-12)


def test_bad_tables_are_refused_in_one_line():
    """Catches a table of another chunking (silently broadcast) and a table that names memories of a
    pool that has none."""
    (q, k, v, mem_k, mem_v), count, recall, _ = reading_case()
    with pytest.raises(ValueError, match=r"recall has shape \(2, 3, 4\).*need \(2, 4, R\)"):
        chunk_attention(q, k, v, mem_k, mem_v, count, recall[:, :3], C, P)
    with pytest.raises(ValueError, match="the pool is empty"):
        chunk_attention(q, k, v, mem_k[:0], mem_v[:0], count[:0], recall, C, P)


# ---------------------------------------------------------------------------------------------
# The pool


def test_memories_are_indexed_and_joined(config):
    """Catches kv and count that go different ways."""
    shape = config.memory_shape
    assert shape == (3, 2, 2, 5, 10)
    g = torch.Generator().manual_seed(7)
    pool = Memories(torch.randn(6, *shape, generator=g), torch.tensor([5, 4, 3, 2, 1, 0]))
    part = pool[torch.tensor([4, 1])]
    assert len(part) == 2 and part.count.tolist() == [1, 4] and torch.equal(part.kv[1], pool.kv[1])
    both = Memories.cat([part, Memories.empty(config), pool[2:3]])
    assert both.count.tolist() == [1, 4, 3] and both.kv.shape == (3, *shape)
    empty = Memories.empty(config)
    assert len(empty) == 0 and empty.kv.shape == (0, *shape) and empty.count.shape == (0,)


def test_only_kept_heads_are_stored_and_come_back_in_their_places():
    """Catches records whose heads change places on the way to disk and back."""
    heads = [(0, 1), (2, 0), (2, 1)]  # of 3 layers with 2 heads
    kv = torch.arange(4 * 3 * 2 * 2 * 5 * 7).view(4, 3, 2, 2, 5, 7)  # M, Lm, 2, Hkv, S, bytes
    packed = memory.pack_heads(kv, heads)
    assert packed.shape == (4, 3, 2, 5, 7) and torch.equal(packed[:, 1], kv[:, 2, :, 0])
    back = memory.unpack_heads(packed, heads, 3, 2)
    for i in range(3):
        for h in range(2):
            want = kv[:, i, :, h] if (i, h) in heads else torch.zeros_like(kv[:, i, :, h])
            assert torch.equal(back[:, i, :, h], want)
    assert memory.pack_heads(kv, None) is kv and memory.unpack_heads(kv, None, 3, 2) is kv


@pytest.mark.parametrize("name", ["token_weights", "select_tokens"])
def test_worked_examples(name):
    """Catches a docstring that shows what the code no longer does."""
    tests = doctest.DocTestFinder().find(getattr(memory, name), name, globs=vars(memory))
    assert sum(len(t.examples) for t in tests) > 0
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0
