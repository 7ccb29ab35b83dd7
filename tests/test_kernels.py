"""kernels.cu against float64, through the same Python functions that call it on a GPU.

Without a GPU tests/cuda_on_cpu.h plays one: g++ compiles the kernels once, and they take tensors of
the CPU. With a GPU and a compiled libkernels.so the same comparisons run there, too.
"""

import ctypes
import math
from pathlib import Path

import pytest
import torch

import kernels

KERNELS = Path(kernels.__file__).with_name("kernels.cu")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where kernels run: the emulator behind CPU tensors, then a GPU, if there is one."""
    if request.param == "cuda" and not kernels.available("cuda")[0]:
        pytest.skip(f"not on a GPU: {kernels.available('cuda')[1]}")
    if request.param == "cpu":
        request.getfixturevalue("emulator")
        torch.use_deterministic_algorithms(True)  # torch.empty is nan: what was never written shows
    yield request.param
    torch.use_deterministic_algorithms(False)


def error(x, true):
    """The relative error, as a norm over the whole tensor."""
    return ((x.double().cpu() - true).norm() / true.norm().clamp(min=1e-30)).item()


# -- The emulator itself -----------------------------------------------------------------------

MINI = r"""
// c (16, 16) = a (16, 16) b (16, 16), and, asked for it, one of the mistakes that must be found
__global__ void product(float* c, const bf16* a, const bf16* b, int mistake) {
    bf16 *a_s = (bf16*)smem, *b_s = a_s + 16 * 24;
    int lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < 32; i += blockDim.x) {
        int at = i / 2 * 24 + i % 2 * 8;
        __pipeline_memcpy_async(a_s + at, a + i * 8, 16);
        __pipeline_memcpy_async(b_s + at, b + i * 8, 16, mistake == 1 && i == 31 ? 16 : 0);
    }
    __pipeline_commit();
    if (mistake != 2) __pipeline_wait_prior(0);
    if (mistake != 3) __syncthreads();
    if (mistake == 4 && threadIdx.x < 7) __syncthreads();
    if (mistake == 5) smem[16 * 24 * 4] = 0;
    if (mistake == 6 && lane < 3) __syncwarp();
    if (mistake == 7) *(volatile unsigned*)(smem + 1530 + lane) = 0;
    unsigned x[4], y[4];
    float sum[2][4] = {};
    ldmatrix(x, a_s + lane % 16 * 24 + lane / 16 * 8);
    ldmatrix_trans(y, b_s + lane % 16 * 24 + lane / 16 * 8);
    mma(sum[0], x, y[0], y[1]);
    mma(sum[1], x, y[2], y[3]);
    for (int e = 0; e < 8; e++)
        c[(lane / 4 + e / 2 % 2 * 8) * 16 + e / 4 * 8 + lane % 4 * 2 + e % 2] = sum[e / 4][e % 4];
}
extern "C" int multiply(float* c, const bf16* a, const bf16* b, int mistake) {
    return launch(product, 1, 64, 16 * 24 * 4, nullptr, c, a, b, mistake);
}
"""


def test_the_emulator_multiplies_and_finds_mistakes(compiled, tmp_path, capfd):
    """Catches an emulator that would pass anything: a tensor core with swapped rows, copies that
    arrive without being waited for, a lost __syncthreads, and errors that go by in silence."""
    source = tmp_path / "mini.cu"
    helpers = KERNELS.read_text().split("\n// -- a. ")[0]
    source.write_text(helpers + MINI)
    library = ctypes.CDLL(str(compiled(source)))
    g = torch.Generator().manual_seed(2)
    a, b = (torch.randn(16, 16, generator=g).bfloat16() for _ in range(2))

    def multiply(mistake=0):
        c = torch.full((16, 16), 7.0)
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (c, a, b))
        return library.multiply(*pointers, mistake), c

    status, c = multiply()
    assert status == 0 and error(c, a.double() @ b.double()) < 1e-6
    cut = b.clone()
    cut[15, 8:] = 0  # the last 16 bytes of b came as zeros
    status, c = multiply(1)
    assert status == 0 and error(c, a.double() @ cut.double()) < 1e-6
    assert multiply(2)[1].isnan().all()  # nobody waited: shared memory is still nan
    library.emulator_reverse(1)
    assert multiply(3)[1].isnan().any()  # the second warp reads before the first has written
    library.emulator_reverse(0)
    for mistake, message in [
        (4, "a barrier that others never reach"),
        (5, "wrote past the shared memory"),
        (6, "threads wait at different collectives"),
        (7, "misaligned access"),
    ]:
        assert multiply(mistake)[0] == 719
        assert message in capfd.readouterr().err
    assert multiply()[0] == 0  # and nothing of that stays


# -- a. Memory attention -----------------------------------------------------------------------


def concatenate_and_mask(q, k, v, mem_k, mem_v, count, recall, chunk_len, n_header):
    """The oracle: [the whole pool, once for each of the R places | all tokens] in one softmax."""
    B, H, n, dh = q.shape
    M, Hkv, S, _ = mem_k.shape
    R = recall.shape[2]
    token = torch.arange(n)
    chunk = (token - n_header).div(chunk_len, rounding_mode="floor").clamp(min=0)
    named = recall[:, chunk, :, None] == torch.arange(M)  # (B, n, R, M)
    named &= token[:, None, None] >= n_header
    filled = torch.arange(S) < count.T[:, :, None]  # (Hkv, M, S)
    filled = filled.repeat_interleave(H // Hkv, 0)  # (H, M, S)
    seen = (named[:, None, ..., None] & filled[:, None, None]).flatten(3)  # (B, H, n, R*M*S)
    seen = torch.cat([seen, (token[:, None] >= token).expand(B, H, n, n)], 3)

    def keys(mem, x):  # (B, H, R*M*S + n, dh)
        mem = mem.transpose(0, 1).flatten(1, 2).repeat(B, 1, R, 1)
        return torch.cat([mem, x], 2).repeat_interleave(H // Hkv, 1)

    scores = q @ keys(mem_k, k).mT / math.sqrt(dh)
    scores = scores.masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ keys(mem_v, v), scores.logsumexp(-1)


def attention_case(B, H, Hkv, dh, S, R, C, P, T, M, scale=1.0):
    """Random tensors of a call, bfloat16. Memory M-1 is nobody's, the first chunk recalls none, a
    memory comes twice in one chunk, others are shared; the last chunk is as long as T makes it.
    What lies in empty slots is nan: nobody may so much as multiply it by zero."""
    g = torch.Generator().manual_seed(B * 1000 + H * 100 + dh + S)

    def randn(*shape):
        return (torch.randn(shape, generator=g) * scale).bfloat16()

    c = -(-T // C)
    recall = torch.randint(-1, M - 1, (B, c, R), generator=g)
    recall[0, -1] = 0
    if c > 1:
        recall[0, 0] = -1
    count = torch.randint(0, S + 1, (M, Hkv), generator=g)  # heads may keep nothing
    count[0] = S
    tensors = [randn(B, H, P + T, dh), *(randn(B, Hkv, P + T, dh) for _ in "kv")]
    empty = (torch.arange(S) >= count[:, :, None])[..., None]  # (M, Hkv, S, 1)
    tensors += [randn(M, Hkv, S, dh).masked_fill(empty, math.nan) for _ in "kv"]
    return tensors, randn(B, H, P + T, dh), count, recall, C, P


CASES = {
    # B, H, Hkv, dh, S, R, C, P, T, M
    "three keys": (2, 3, 1, 16, 3, 1, 7, 2, 21, 4),
    "shared memories, short last chunk": (2, 6, 2, 48, 5, 4, 7, 3, 24, 6),
    "2.4b": (1, 10, 2, 80, 8, 5, 64, 3, 70, 7),
    "128 keys in one memory": (1, 3, 3, 112, 128, 1, 16, 1, 17, 3),
    "128 keys in four": (1, 2, 2, 128, 32, 4, 16, 0, 33, 5),
    "one head": (3, 1, 1, 32, 2, 3, 5, 4, 1, 3),
    "large scores": (1, 5, 1, 64, 17, 2, 9, 2, 20, 4, 2.0),
}


def side_by_side(x):
    """The same (B, H, n, dh), with the heads of a token as neighbours, amid other numbers."""
    wide = torch.full((*x.transpose(1, 2).shape[:2], x.shape[1] + 3, x.shape[3]), math.nan)
    place = wide.to(x)[:, :, 2:-1].transpose(1, 2)
    return place.copy_(x)


LAYOUTS = {"head by head": torch.Tensor.contiguous, "token by token": side_by_side}


def kernel_attention(case, device, lay=torch.Tensor.contiguous):
    """The kernels, and for the causal part float64. Returns out, lse, dq, dmem_k, dmem_v."""
    (q, k, v, mem_k, mem_v), dout, count, recall, C, P = case
    nothing = torch.full_like(recall, -1)
    wide = [x.double().nan_to_num() for x in (q, k, v, mem_k, mem_v)]
    out, lse = concatenate_and_mask(*wide, count, nothing, C, P)
    out = lay(out.bfloat16().to(device))
    lse = lse.float().to(device)
    pool = torch.stack([mem_k, mem_v, mem_v], 1).to(device)  # as in a pool: more between memories
    rest = [pool[:, 0], pool[:, 1], count.to(device), recall.to(device)]
    q_ = lay(q.to(device))
    dout_ = lay(dout.to(device))
    kernels.memory_attention(out, lse, q_, *rest, C, P)
    # The causal part's dq, by its own formula and given the merged out and lse.
    G = q.shape[1] // k.shape[1]
    n = q.shape[2]
    scale = 1 / math.sqrt(q.shape[3])
    k = wide[1].repeat_interleave(G, 1)
    v = wide[2].repeat_interleave(G, 1)
    p = (wide[0] @ k.mT * scale - lse.double().cpu().unsqueeze(-1)).exp() * torch.ones(n, n).tril()
    delta = (dout.double() * out.double().cpu()).sum(-1, keepdim=True)
    dq = lay((p * (dout.double() @ v.mT - delta) * scale @ k).bfloat16().to(device))
    grads = kernels.memory_attention_backward(dq, dout_, q_, out, lse, *rest, C, P)
    return out, lse, dq, *grads


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_memory_attention_equals_concatenate_and_mask(name, layout, device):
    """Catches a wrong index, scale or mask anywhere in the kernels: the merge, dq, dk and dv, for
    head sizes, groups, slots and chunks that fill no tile, in either order of threads."""
    case = attention_case(*CASES[name])
    tensors, dout, count, recall, C, P = case
    leaves = [x.double().nan_to_num().requires_grad_() for x in tensors]
    out, lse = concatenate_and_mask(*leaves, count, recall, C, P)
    grads = torch.autograd.grad(out, leaves, dout.double())
    true = out.detach(), lse.detach(), grads[0], grads[3], grads[4]
    results = kernel_attention(case, device, LAYOUTS[layout])
    for what, x, y in zip(["out", "lse", "dq", "dmem_k", "dmem_v"], results, true, strict=True):
        assert error(x, y) < (1e-6 if what == "lse" else 1e-2), what
    empty = torch.arange(tensors[3].shape[2]) >= count[..., None]  # (M, Hkv, S)
    for grad in (results[3].cpu(), results[4].cpu()):
        assert (grad[-1] == 0).all() and (grad[empty] == 0).all()
    if device == "cpu":
        kernels.libraries["cpu"].emulator_reverse(1)
    again = kernel_attention(case, device, LAYOUTS[layout])
    assert all(torch.equal(x, y) for x, y in zip(results, again, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_plain_kernel_is_the_fast_one(name, device):
    """Catches a first version, there to be read, that says something else than the fast one."""
    (q, _, _, mem_k, mem_v), _, count, recall, C, P = attention_case(*CASES[name])
    g = torch.Generator().manual_seed(3)
    out = torch.randn(q.shape, generator=g).bfloat16()
    lse = torch.randn(q.shape[:3], generator=g)
    out[:, :, P] = math.nan
    lse[:, :, P] = math.inf  # no key before
    arguments = [x.to(device) for x in (q, mem_k, mem_v, count, recall)]
    results = []
    for function in ("memory_attention", "memory_attention_plain"):
        both = out.clone().to(device), lse.clone().to(device)
        kernels.memory_attention_by(function, *both, *arguments, C, P)
        results.append(both)
    (out, lse), (plain_out, plain_lse) = results
    torch.testing.assert_close(plain_lse, lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain_out, out, rtol=2**-6, atol=1e-2, equal_nan=True)


def test_memory_attention_leaves_alone_what_reads_no_memory(device):
    """Catches a header that attends memories, and rounding (or nan) in chunks that recall none."""
    case = attention_case(2, 6, 2, 48, 5, 4, 7, 3, 24, 6)
    (q, _, _, mem_k, mem_v), dout, count, recall, C, P = case
    g = torch.Generator().manual_seed(3)
    before = torch.randn(q.shape, generator=g).bfloat16(), torch.randn(q.shape[:3], generator=g)
    out, lse, q, mem_k, mem_v, count, dout = (
        x.clone().to(device) for x in (*before, q, mem_k, mem_v, count, dout)
    )
    for table in (recall, torch.full_like(recall, -1)):
        out = before[0].clone().to(device)
        lse = before[1].clone().to(device)
        table = table.to(device)
        kernels.memory_attention(out, lse, q, mem_k, mem_v, count, table, C, P)
        slots = (count[table.clamp(min=0)] * (table >= 0).unsqueeze(-1)).sum(2).cpu()  # (B, c, Hkv)
        reads = slots.transpose(1, 2).repeat_interleave(q.shape[1] // slots.shape[2], 1) > 0
        reads = reads.repeat_interleave(C, 2)[:, :, : q.shape[2] - P]  # (B, H, T)
        same = (out.cpu() == before[0]).all(-1) & (lse.cpu() == before[1])  # (B, H, n)
        assert same[:, :, :P].all()
        assert (same[:, :, P:] == ~reads).all()
        dq = dout.clone()
        grads = kernels.memory_attention_backward(
            dq, dout, q, out, lse, mem_k, mem_v, count, table, C, P
        )
        same = (dq == dout).all(-1).cpu()
        assert same[:, :, :P].all() and (same[:, :, P:] == ~reads).all()
        assert all((x != 0).any() == (table >= 0).any() for x in grads)


@pytest.mark.parametrize("nothing", [math.inf, -math.inf])
def test_memory_attention_where_nothing_came_before(nothing, device):
    """Catches nan from -inf - -inf: rows of which the causal part has no key (lse is +inf on CUDA,
    out is anything) get the memories' softmax alone, or stay as they are."""
    case = attention_case(1, 2, 1, 32, 3, 2, 4, 1, 8, 3)
    (q, _, _, mem_k, mem_v), dout, count, recall, C, P = case
    recall[0] = torch.tensor([[-1, 2], [1, 0]])
    count[2] = 0  # a memory of nothing is nothing, too
    out = torch.full_like(q, math.nan)
    lse = torch.full(q.shape[:3], nothing)
    rest = [x.to(device) for x in (q, mem_k, mem_v, count, recall)]
    out = out.to(device)
    lse = lse.to(device)
    kernels.memory_attention(out, lse, *rest, C, P)
    assert (lse[:, :, :5] == nothing).all() and out[:, :, :5].isnan().all()
    one = mem_k[1, 0, : count[1]]
    two = mem_k[0, 0, : count[0]]
    scores = q[0, :, 5:].double() @ torch.cat([one, two]).double().T / math.sqrt(32)
    values = torch.cat([mem_v[1, 0, : count[1]], mem_v[0, 0, : count[0]]]).double()
    assert error(out[0, :, 5:], scores.softmax(-1) @ values) < 1e-2
    assert error(lse[0, :, 5:], scores.logsumexp(-1)) < 1e-6
    dq = torch.zeros_like(rest[0])
    arguments = dq, dout.to(device), rest[0], out, lse, *rest[1:], C, P
    grads = kernels.memory_attention_backward(*arguments)
    assert all(x.isfinite().all() for x in (dq, *grads)) and (dq[:, :, :5] == 0).all()


def test_memory_attention_refuses_an_odd_head_size(device):
    """Catches a kernel that runs past its registers, or an error code that nobody looks at."""
    assert kernels.fits(torch.bfloat16, 48) and not kernels.fits(torch.bfloat16, 40)
    with pytest.raises(RuntimeError, match="memory_attention"):
        kernel_attention(attention_case(1, 1, 1, 40, 3, 2, 4, 1, 8, 3), device)


def test_what_torch_compile_is_told_about_memory_attention(device):
    """Catches a schema that hides which arguments change, and fakes of another shape or type."""
    (q, _, _, mem_k, mem_v), dout, *table = attention_case(2, 3, 1, 16, 3, 1, 7, 2, 21, 4)
    rest = [x.to(device) if torch.is_tensor(x) else x for x in (mem_k, mem_v, *table)]
    out = torch.zeros_like(q)
    lse = torch.zeros(q.shape[:3])
    dq = torch.zeros_like(q)
    q, dout, out, lse, dq = (x.to(device) for x in (q, dout, out, lse, dq))
    checks = "test_schema", "test_faketensor"
    forward = out, lse, q, *rest
    torch.library.opcheck(kernels.memory_attention, forward, test_utils=checks)
    backward = dq, dout, q, out, lse, *rest
    torch.library.opcheck(kernels.memory_attention_backward, backward, test_utils=checks)
