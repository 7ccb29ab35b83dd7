"""The door to kernels.cu: its C functions as PyTorch operators, called through ctypes.

`make kernels` compiles it to libkernels.so, which knows nothing of PyTorch: one library for all its
versions. The operators never wait for the GPU, and torch.compile, CUDA graphs and the meta device
take them. memory.py has PyTorch code of the same meaning, and chooses. All tensors are contiguous,
bfloat16 unless said otherwise.
"""

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor as T

VERSION = 1  # of the C functions and their arguments; kernels.cu has the same number
SELECTION = 1  # the rule of selection that kernels.cu knows; see memory.keep_tokens
BF16, F32, BOOL = torch.bfloat16, torch.float32, torch.bool
U8, I32, I64 = torch.uint8, torch.int32, torch.int64
libraries, reasons = {}, {}  # by type of device: the library; why it cannot run, None: not asked


def load(path, device="cpu"):
    """Puts the library at `path` behind the operators on `device`: the tests have one for a CPU."""
    library = ctypes.CDLL(str(Path(path).resolve()))
    if (version := library.memory3_kernels_version()) != VERSION:
        raise OSError(f"{path} is of another kernels.cu (version {version}, not {VERSION})")
    library.memory3_kernels_trouble.restype = ctypes.c_char_p
    libraries[device], reasons[device] = library, None


try:
    load(Path(__file__).with_name("libkernels.so"), "cuda")
except (OSError, AttributeError) as e:  # not there, or not of this kernels.cu
    reasons["cuda"] = f"run make kernels: {e}"


def available(device):
    """(True, what runs) or (False, why not). MEMORY3_KERNELS=0 in the environment says no."""
    kind = torch.device(device).type
    if reasons.get(kind, "") is None:  # once: is there no GPU, one of another kind, an old driver?
        reasons[kind] = (libraries[kind].memory3_kernels_trouble() or b"").decode()
    why = reasons.get(kind, f"kernels.cu is not for {kind}")
    if os.environ.get("MEMORY3_KERNELS") == "0":
        why = "MEMORY3_KERNELS=0"
    return not why, why or "kernels.cu"


def fits(dtype, head_dim, group=1, keys=0):
    """Whether kernels.cu takes these sizes. group: H / Hkv; keys: R*S or a reference's tokens."""
    return dtype == BF16 and head_dim in range(16, 129, 16) and group <= 16 and keys <= 128


def _run(name, *args):
    """Calls the C function: a tensor as its pointer, None as a null one, numbers, then the stream.
    A dtype among the arguments is that of the tensors after it: C would take any."""
    device, dtype, values = args[1].device, None, []
    for x in args:
        if isinstance(x, T) and ((x.dtype, x.device) != (dtype, device) or not x.is_contiguous()):
            found = f"{x.dtype} on {x.device}, shape {tuple(x.shape)}, strides {x.stride()}"
            raise ValueError(f"kernels.{name}: {dtype} on {device} and contiguous, not {found}")
        if isinstance(x, torch.dtype):
            dtype = x
        else:
            values.append(ctypes.c_void_p(x.data_ptr()) if isinstance(x, T) else x)
    if device.type not in libraries:
        raise RuntimeError(f"kernels.{name} on {device}: {available(device)[1]}")
    cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
    with torch.cuda.device(device.index if cuda else -1):  # a launch goes to the current GPU
        error = getattr(libraries[device.type], name)(*values, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"kernels.{name}: CUDA error {error}")


@torch.library.custom_op("memory3::memory_attention", mutates_args=("out", "lse"))
def memory_attention(out: T, lse: T, q: T, k: T, v: T, count: T, recall: T, C: int, P: int) -> None:
    """memory.memory_attention, where the shapes are explained; in place, lse float32."""
    (B, H, n, dh), (_, Hkv, S, _), (_, c, R) = q.shape, k.shape, recall.shape
    sizes = B, H, Hkv, n, dh, S, c, R, C, P
    _run("memory_attention", BF16, out, F32, lse, BF16, q, k, v, I64, count, recall, *sizes)


@torch.library.custom_op("memory3::memory_attention_backward", mutates_args=("dq",))
def memory_attention_backward(
    dq: T, dout: T, q: T, out: T, lse: T, k: T, v: T, count: T, recall: T, C: int, P: int
) -> tuple[T, T]:
    """memory.memory_attention_backward. The same bits in every run: uses are added in order."""
    (B, H, n, dh), (M, Hkv, S, _), (_, c, R) = q.shape, k.shape, recall.shape
    memories, uses = recall.flatten().sort(stable=True)  # where the table names memory m:
    first = torch.searchsorted(memories, torch.arange(M + 1, device=q.device))  # uses[first[m]:]
    dk, dv, delta = torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    given = BF16, dout, q, out, F32, lse, BF16, k, v, I64, count, recall, uses, first
    sizes = B, M, H, Hkv, n, dh, S, c, R, C, P
    _run("memory_attention_backward", BF16, dq, dk, dv, F32, delta, *given, *sizes)
    return dk, dv


@torch.library.custom_op("memory3::decode_attention", mutates_args=())
def decode_attention(q: T, k: T, v: T, valid: T | None, length: T, first: int, slots: int) -> T:
    """memory.decode_attention; the first two strides of keys and values are free. first: where the
    slots begin; valid: None without slots."""
    (B, H, dh), (_, Hkv, N, _), strides = q.shape, k.shape, k.stride()
    if v.stride() != strides:
        raise ValueError(f"kernels.cu: keys have strides {strides}, values {v.stride()}")
    # Parts of 64 keys or more, and no more of them than keep a GPU of some 130 units busy.
    parts = max(1, min(-(-N // 64), 512 // (B * Hkv)))
    y, parts_y = torch.empty_like(q), q.new_empty(B * H * parts * (dh + 1), dtype=F32)
    sizes = B, H, Hkv, N, dh, *strides[:2], first, slots, parts
    keys = BF16, q, k[0, 0], v[0, 0], BOOL, valid, I64, length
    _run("decode_attention", BF16, y, F32, parts_y, *keys, *sizes)
    return y


@torch.library.custom_op("memory3::decode_codes", mutates_args=("kv",))
def decode_codes(kv: T, codes: T, table: T, fields: T, rows: T, first: int) -> None:
    """memory.fill_slots of codes (n, Lm, 2, Hkv, S, bytes) uint8. kv (Lm, 2, B, Hkv, N, dh); table
    (codes' rows, dh) float32; fields (numbers a code, 3) int32: codec.fields beside codec.first;
    rows (B, R) int64: whose codes come to the keys from first + r*S on, -1 = nobody's."""
    (Lm, _, B, Hkv, N, dh), (*_, S, size), R = kv.shape, codes.shape, rows.shape[1]
    sizes = Lm, B, Hkv, N, dh, S, size, len(fields), R, first
    _run("decode_codes", BF16, kv, U8, codes, F32, table, I32, fields, I64, rows, *sizes)


@torch.library.custom_op("memory3::select", mutates_args=())
def select(q: T, k: T, mask: T, s: int, approximate: bool) -> tuple[T, T]:
    """memory.token_weights and memory.select_tokens: (N, Hkv, n) float32 and (N, Hkv, s) int64."""
    (N, H, n, dh), Hkv = q.shape, k.shape[1]
    weights, chosen = q.new_empty((N, Hkv, n), dtype=F32), q.new_empty((N, Hkv, s), dtype=I64)
    sizes = N, H, Hkv, n, dh, s, approximate
    _run("select_tokens", F32, weights, I64, chosen, BF16, q, k, BOOL, mask, *sizes)
    return weights, chosen


memory_attention_backward.register_fake(lambda *x: (torch.empty_like(x[5]), torch.empty_like(x[6])))
decode_attention.register_fake(lambda q, *_: torch.empty_like(q))  # fakes: what they would return
select.register_fake(
    lambda q, k, mask, s, _: (
        q.new_empty(k.shape[:3], dtype=F32),
        q.new_empty((*k.shape[:2], s), dtype=I64),
    )
)
