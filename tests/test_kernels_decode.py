"""kernels.cu's decode attention, codes and choice of tokens, and kernels.py's operators.

tests/cuda_on_cpu.h runs the kernels on the CPU, through the operators that a GPU runs, and where
there is a GPU the same tests run there. Sizes are distinct and odd where the kernels allow it.
"""

from types import SimpleNamespace

import pytest
import torch

import kernels
from memory import select_tokens, token_weights
from quantize import Codec, layout

BF16 = torch.bfloat16


@pytest.fixture(params=["cpu", "cpu, last thread first", "cuda"])
def device(request):
    if request.param == "cuda":
        ok, why = kernels.available("cuda")
        if not ok:
            pytest.skip(why)
        return "cuda"
    request.getfixturevalue("emulator").emulator_reverse(request.param != "cpu")
    return "cpu"


def random(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g)).to(BF16)


def relative(x, y):
    return float((x.double().cpu() - y).norm() / y.norm())


# -- b. Decode attention ------------------------------------------------------------------------


def attention(q, keys, values, valid, n, first, slots):
    """Softmax attention over the first n keys, slots where they are valid; in float64."""
    B, H, dh = q.shape
    G = H // keys.shape[1]
    counts = torch.ones(B, H // G, n, dtype=bool)
    if slots:
        counts[:, :, first : first + slots] = valid[:, :, : n - first]
    counts = counts.repeat_interleave(G, 1)  # (B, H, n)
    k, v = (x.double()[:, :, :n].repeat_interleave(G, 1) for x in (keys, values))
    scores = (k @ q.double().unsqueeze(-1)).squeeze(-1) / dh**0.5  # (B, H, n)
    p = scores.masked_fill(~counts, -torch.inf).softmax(-1)
    return (p.unsqueeze(2) @ v.masked_fill(~counts[..., None], 0)).squeeze(2)


def decode(device, q, keys, values, valid, n, first, slots):
    """The kernel, given all keys but the last, number n - 1, which comes as the new token's. What
    it leaves in the cache must be all keys, and what lies behind them as it was."""
    B, Hkv, N, dh = keys.shape
    length = torch.tensor([n], device=device)
    q, keys, values = (x.to(device) for x in (q, keys, values))
    valid = valid if valid is None else valid.to(device)
    qkv = torch.cat([q, keys[:, :, n - 1], values[:, :, n - 1]], 1)  # as the projections lie
    new = qkv.split([q.shape[1], Hkv, Hkv], 1)
    want = keys.clone(), values.clone()
    keys[:, :, n - 1] = values[:, :, n - 1] = torch.nan
    y = kernels.decode_attention(*new, keys, values, valid, length, first, slots)
    for x, before in zip((keys, values), want, strict=True):
        torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    return y


@pytest.mark.parametrize(
    "B, Hkv, G, dh, N, first, slots, lengths",
    [
        (2, 3, 5, 80, 333, 3, 40, (44, 64, 65, 129, 333)),  # as in the 2.4b model; tiles of 64
        (1, 1, 1, 16, 131, 0, 0, (1, 16, 17, 128, 131)),  # the first token of all; no slots
        (3, 2, 3, 48, 70, 5, 11, (17, 63, 70)),
        (1, 2, 16, 128, 150, 2, 130, (133, 150)),  # as many heads as rows; slots over three tiles
        (7, 19, 9, 32, 193, 1, 7, (193,)),  # more tiles than parts
    ],
)
def test_decode_attention(device, B, Hkv, G, dh, N, first, slots, lengths):
    """A key left out or read twice at the border of a tile, a part or the slots; a query head
    given another's row; what lies beyond the length or in an unused slot read (it is nan)."""
    q = random(B, Hkv * G, dh, scale=2)
    kv = random(2, B, Hkv, N, dh, seed=1)
    valid = torch.rand(B, Hkv, slots, generator=torch.Generator().manual_seed(2)) < 0.6
    for n in lengths:
        keys, values = kv.clone()
        keys[:, :, n:] = values[:, :, n:] = torch.nan
        unused = torch.zeros(B, Hkv, N, dtype=bool)
        unused[:, :, first : first + slots] = ~valid
        values[unused] = torch.nan
        y = decode(device, q, keys, values, valid, n, first, slots)
        want = attention(q, keys, values, valid, n, first, slots)
        assert y.dtype == BF16 and relative(y, want) < 6e-3, n


def test_decode_without_any_valid_slot(device):
    """A tile without a key gives nan, or counts for something, where nothing was recalled."""
    B = 2
    Hkv = 3
    G = 2
    dh = 16
    N = 201
    first = 1
    slots = 192
    q, keys, values = random(B, Hkv * G, dh), *random(2, B, Hkv, N, dh, seed=1)
    valid = torch.zeros(B, Hkv, slots, dtype=bool)
    y = decode(device, q, keys, values, valid, 195, first, slots)
    assert relative(y, attention(q, keys, values, valid, 195, first, slots)) < 6e-3


def test_decode_again(device):
    """The count of finished blocks is not put back, so that a replayed graph never merges; blocks
    that add in the order in which they happen to finish; a length remembered from the capture."""
    B = 2
    Hkv = 3
    G = 5
    dh = 80
    N = 333
    q, keys, values = random(B, Hkv * G, dh), *random(2, B, Hkv, N, dh, seed=1)
    first = decode(device, q, keys, values, None, 333, 0, 0)
    decode(device, q, keys, values, None, 70, 0, 0)  # fewer parts take part
    assert torch.equal(decode(device, q, keys, values, None, 333, 0, 0), first)


def test_decode_reads_a_layer_of_the_cache_in_place(device):
    """Strides of the whole cache ignored: its layers have other lengths than the buffer."""
    B = 3
    Hkv = 2
    G = 3
    dh = 16
    N = 90
    cache = random(2, B, 5, N + 7, dh).to(device)  # two layers side by side, say
    keys, values = cache[:, :, 1 : 1 + Hkv, 3 : 3 + N]
    q = random(B, Hkv * G, dh, seed=1)
    y = decode(device, q, keys, values, None, 81, 0, 0)
    want = attention(q, keys.cpu(), values.cpu(), None, 81, 0, 0)
    assert relative(y, want) < 6e-3


def test_decode_in_a_cuda_graph():
    """The length or the mask read at the capture instead of at the replay."""
    if not kernels.available("cuda")[0]:
        pytest.skip(kernels.available("cuda")[1])
    B = 2
    Hkv = 3
    G = 5
    dh = 80
    N = 333
    q = random(B, Hkv * G, dh).cuda()
    kv = random(2, B, Hkv, N, dh, seed=1).cuda()
    new = random(2, B, Hkv, dh, seed=3).cuda()
    valid = torch.ones(B, Hkv, 40, dtype=bool, device="cuda")
    length = torch.tensor([99], device="cuda")
    kernels.decode_attention(q, *new, *kv, valid, length, 3, 40)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.decode_attention(q, *new, *kv, valid, length, 3, 40)
    for n, share in (50, 1), (333, 3), (64, 2):
        length.fill_(n)
        valid.copy_((torch.arange(40, device="cuda") % share == 0).expand_as(valid))
        graph.replay()
        want = attention(q.cpu(), *kv.cpu(), valid.cpu(), n, 3, 40)
        assert relative(y, want) < 6e-3


# -- c. Codes -----------------------------------------------------------------------------------


def fields(codec):
    return torch.cat([torch.tensor(codec.fields), codec.first[:, None]], 1).int()


@pytest.mark.parametrize(
    "spec, dh, Lm, Hkv, S",
    [
        ("Residual2x14,PQ8x10", 80, 1, 3, 5),  # the paper's; 10 bits begin anywhere in a byte
        ("Residual3x5,PQ4x7", 16, 5, 3, 11),  # 330 vectors: three blocks, the last not full
        ("Residual1x1,PQ2x16", 12, 2, 1, 3),  # 16 bits; dh that only PyTorch would take, too
        ("Residual4x3,PQ3x11", 48, 1, 2, 7),  # the last number ends with the code
    ],
)
def test_codes(device, spec, dh, Lm, Hkv, S):
    """A bit read from the wrong place, a byte read past the codes, slots of another sequence or
    layer, and anything changed that is not a slot."""
    g = torch.Generator().manual_seed(3)
    numbers, size = layout(spec)
    rows = sum(1 << bits for _, bits in numbers)
    codec = Codec(spec, torch.randn(rows, dh, generator=g))
    M = 4
    B = 2
    R = 3
    first = 2
    N = first + R * S + 5
    codes = torch.randint(256, (M, Lm, 2, Hkv, S, size), generator=g, dtype=torch.uint8)
    kv = random(Lm, 2, B, Hkv, N, dh)
    recall = torch.tensor([[3, -1, 0], [1, 3, 3]])
    want = kv.clone()
    for b, r in (recall >= 0).nonzero().tolist():
        at = first + r * S
        want[:, :, b, :, at : at + S] = codec.decode(codes[recall[b, r]]).to(BF16)
    kv, codes, table, where, recall = (
        x.to(device) for x in (kv, codes, codec.table, fields(codec), recall)
    )
    kernels.decode_codes(kv, codes, table, where, recall, first)
    assert torch.allclose(kv.cpu().float(), want.float(), rtol=2**-7, atol=1e-6)
    assert (kv.cpu() == want).float().mean() > 0.999  # sums in another order, then rounded


# -- d. Token weights and choice ----------------------------------------------------------------


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize(
    "Hkv, G, n, dh, s, lengths",
    [
        (2, 5, 128, 80, 8, (128, 127, 3)),  # the paper's; a reference shorter than s
        (3, 1, 37, 48, 7, (37, 17, 0, 1)),  # one without any token
        (1, 3, 5, 16, 9, (5, 4)),  # none is as long as s
        (1, 2, 67, 128, 11, (67, 48)),
    ],
)
def test_select(device, Hkv, G, n, dh, s, lengths, approximate):
    """Padding that asks or is asked, a query head of another group, rows or columns past n."""
    N = len(lengths)
    q = random(N, Hkv * G, n, dh)
    k = random(N, Hkv, n, dh, seed=1)
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    want = token_weights(q, k, mask, approximate)
    tensors = (x.to(device) for x in (q, k, mask))
    weights, chosen = (x.cpu() for x in kernels.select(*tensors, s, approximate))
    assert weights.dtype == torch.float32
    assert torch.allclose(weights, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(chosen, select_tokens(weights, mask, s))
    assert torch.equal(chosen, select_tokens(want, mask, s))


def test_select_ties(device):
    """Of equal tokens the later one kept, or one of them left out by its twin."""
    N = 2
    Hkv = 3
    n = 50
    dh = 16
    s = 11
    q = random(N, 2 * Hkv, n, dh)
    k = random(N, Hkv, 4, dh, seed=1)
    k = k[:, :, torch.arange(n) % 4].contiguous()  # four keys, over and over
    mask = torch.arange(n) < torch.tensor([50, 29])[:, None]
    tensors = (x.to(device) for x in (q, k, mask))
    weights, chosen = (x.cpu() for x in kernels.select(*tensors, s, False))
    assert len(weights[0, 0].unique()) == 4
    assert torch.equal(chosen, select_tokens(weights, mask, s))


def test_approximate_weights_of_large_scores(device):
    """exp of a score near 300 is infinity: it must be shifted by the largest, wherever it is."""
    q = random(1, 6, 70, 16, scale=8)
    k = random(1, 2, 70, 16, seed=1, scale=8)
    mask = torch.ones(1, 70, dtype=bool)
    want = token_weights(q, k, mask, True)
    weights, _ = kernels.select(*(x.to(device) for x in (q, k, mask)), 3, True)
    assert torch.allclose(weights.cpu(), want, rtol=2e-4, atol=1e-6) and want.max() >= 1


# -- kernels.py ---------------------------------------------------------------------------------


def calls():
    """Small arguments for each operator but those of memory attention."""
    keys, values = random(2, 1, 2, 20, 16)
    new = random(1, 6, 16), *random(2, 1, 2, 16, seed=3)
    valid = torch.ones(1, 2, 5, dtype=bool)
    length = torch.tensor([9])
    kv = random(1, 2, 1, 2, 9, 16)
    codes = torch.zeros(2, 1, 2, 2, 3, 2, dtype=torch.uint8)
    table = torch.ones(512, 16)
    where = torch.tensor([[0, 8, 0], [8, 8, 256]], dtype=torch.int32)
    mask = torch.ones(3, 7, dtype=bool)
    return {
        kernels.decode_attention: (*new, keys, values, valid, length, 2, 5),
        kernels.decode_codes: (kv, codes, table, where, torch.tensor([[1, -1]]), 2),
        kernels.select: (random(3, 4, 7, 16), random(3, 2, 7, 16), mask, 5, False),
    }


@pytest.mark.parametrize("op", calls(), ids=lambda op: op._name)
def test_torch_accepts_the_operators(emulator, op):
    """A schema that hides a mutation, a fake of another shape or dtype: torch.compile would then
    compute something else without a word."""
    args = calls()[op]
    torch.library.opcheck(op, args)
    real = op(*args)
    fake = op(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args))
    as_tuple = lambda x: () if x is None else x if isinstance(x, tuple) else (x,)  # noqa: E731
    for x, y in zip(as_tuple(real), as_tuple(fake), strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("op", calls(), ids=lambda op: op._name)
def test_refuses_what_c_would_misread(emulator, op):
    """float32 or a transposed tensor, read as contiguous bfloat16."""
    first, *rest = calls()[op]
    with pytest.raises(ValueError, match="bfloat16"):
        op(first.float(), *rest)
    with pytest.raises(ValueError, match="contiguous"):
        op(first.mT.contiguous().mT, *rest)


def test_fits_is_what_the_functions_take(emulator):
    """Sizes that memory.py would send here, to be told no; or that it would not, for nothing."""
    for dh in (16, 128, 24, 144):
        q = random(1, 2, dh)
        keys = random(1, 1, 20, dh)
        new = keys[:, :, 8]
        args = q, new, new, keys, keys.clone(), None, torch.tensor([9]), 0, 0
        if kernels.fits(BF16, dh, 2):
            want = attention(q, keys, keys, None, 9, 0, 0)
            assert relative(kernels.decode_attention(*args), want) < 6e-3
        else:
            with pytest.raises(RuntimeError, match="error 1"):
                kernels.decode_attention(*args)
    assert not kernels.fits(torch.float32, 16) and not kernels.fits(BF16, 16, 17)
    assert kernels.fits(BF16, 80, 5, 128) and not kernels.fits(BF16, 80, 5, 129)


def test_says_why_not(emulator, monkeypatch):
    """A silent fall-back; a GPU asked whether it is there at each layer of each step; a library of
    another kernels.cu, whose arguments mean something else."""
    asked = []
    trouble = SimpleNamespace(memory3_kernels_trouble=lambda: asked.append(1) or b"an old driver")
    monkeypatch.setitem(kernels.libraries, "cuda", trouble)
    monkeypatch.setitem(kernels.reasons, "cuda", None)
    for _ in range(3):
        assert kernels.available("cuda:1") == (False, "an old driver") and len(asked) == 1
    assert kernels.available("cpu") == (True, "kernels.cu")
    assert kernels.available("meta") == (False, "kernels.cu is not for meta")
    monkeypatch.setenv("MEMORY3_KERNELS", "0")
    assert kernels.available("cpu") == (False, "MEMORY3_KERNELS=0")
    monkeypatch.delenv("MEMORY3_KERNELS")
    assert kernels.available("cpu") == (True, "kernels.cu")
    monkeypatch.setattr(kernels, "VERSION", kernels.VERSION + 1)
    with pytest.raises(OSError, match="another kernels.cu"):
        kernels.load(emulator._name, "elsewhere")
    assert "elsewhere" not in kernels.libraries
