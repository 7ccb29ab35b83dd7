"""The door to kernels.cu: its C functions as PyTorch operators, called through ctypes.

`make kernels` compiles it to libkernels.so, which knows nothing of PyTorch: one library serves all
versions of it. The operators never wait for the GPU; they work under torch.compile, in CUDA graphs
and on the meta device. memory.py has PyTorch code that computes the same, and chooses between the
two. Unless said otherwise tensors are contiguous and bfloat16; the lse is float32, tables of
indices int64, masks bool.
"""

import ctypes
import math
import os
from pathlib import Path

import torch
from torch import Tensor

VERSION = 2  # of the C functions and their arguments; kernels.cu has the same number
SELECTION = 1  # the rule of selection that kernels.cu knows; see memory.keep_tokens

BF16 = torch.bfloat16
F32 = torch.float32
I64 = torch.int64


# -- The library -------------------------------------------------------------------------------

libraries = {}  # by type of device: the library of C functions
reasons = {}  # by type of device: why its library cannot run; "" = it can, None = not tried yet


def load(path, device="cpu"):
    """Puts the library at `path` behind the operators on `device`: the tests have one for a CPU.

    OSError if it is not there, or of another version of kernels.cu.
    """
    library = ctypes.CDLL(str(Path(path).resolve()))
    version = library.memory3_kernels_version()
    if version != VERSION:
        raise OSError(f"{path} is of another kernels.cu (version {version}, not {VERSION})")
    library.memory3_kernels_trouble.restype = ctypes.c_char_p
    libraries[device] = library
    reasons[device] = None


try:
    load(Path(__file__).with_name("libkernels.so"), "cuda")
except (OSError, AttributeError) as error:  # not there, or not of this kernels.cu
    reasons["cuda"] = f"run make kernels: {error}"


def available(device):
    """(True, what runs) or (False, why not). MEMORY3_KERNELS=0 in the environment says no."""
    if os.environ.get("MEMORY3_KERNELS") == "0":
        return False, "MEMORY3_KERNELS=0"
    kind = torch.device(device).type
    if kind not in reasons:
        return False, f"kernels.cu is not for {kind}"
    if reasons[kind] is None:  # tried once: no GPU, one of another kind, an old driver?
        trouble = libraries[kind].memory3_kernels_trouble()
        reasons[kind] = trouble.decode() if trouble else ""
    if reasons[kind]:
        return False, reasons[kind]
    return True, "kernels.cu"


def fits(dtype, head_dim, group=1, keys=0):
    """Whether kernels.cu takes these sizes. group: H / Hkv; keys: R*S or a reference's tokens."""
    return dtype == BF16 and head_dim in range(16, 129, 16) and group <= 16 and keys <= 128


# what C's pointers point to, by the names of _run's arguments
TYPES = dict(
    bf16=BF16, f32=F32, i64=I64, i32=torch.int32, u8=torch.uint8, mask=torch.bool
)  # fmt: skip


def _run(name, device, sizes, **tensors):
    """Calls the C function `name`: pointers, then the numbers of `sizes`, then PyTorch's stream.

    tensors: lists by type, as in TYPES, in the order of the C function's arguments; they are
    checked, since C would take anything. None becomes a null pointer.
    """
    if device.type not in libraries:
        raise RuntimeError(f"kernels.{name} on {device}: {available(device)[1]}")
    values = []
    for kind, group in tensors.items():
        for tensor in group:
            values.append(_pointer(name, tensor, TYPES[kind], device))
    function = getattr(libraries[device.type], name)
    # C returns at once; the GPU works through the stream on its own
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        with torch.cuda.device(device):  # a launch goes to the current GPU
            error = function(*values, *sizes, ctypes.c_void_p(stream))
    else:
        error = function(*values, *sizes, None)
    if error:
        raise RuntimeError(f"kernels.{name}: CUDA error {error}")


def _pointer(name, tensor, dtype, device):
    """The address of a tensor's numbers. ValueError if they are not what C will take them for."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        found = f"{tensor.dtype} on {tensor.device}, shape {tuple(tensor.shape)}"
        found += f", strides {tensor.stride()}"
        raise ValueError(f"kernels.{name}: {dtype} on {device} and contiguous, not {found}")
    return ctypes.c_void_p(tensor.data_ptr())


# -- The operators -----------------------------------------------------------------------------

# An operator is a function that PyTorch knows: a schema that says what it changes, what it does on
# a CPU (the emulator of the tests) and on CUDA, and what it would return for tensors without data.
_memory3 = torch.library.Library("memory3", "DEF")


def operator(mutates=()):
    """Makes a function of tensors the PyTorch operator memory3::<its name>.

    (torch.library.custom_op does the same in one line, and costs ten times as long at each call.)
    mutates: the names of the arguments that it changes in place.
    """

    def register(function):
        name = function.__name__
        _memory3.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        _memory3.impl(name, function, "CPU")
        _memory3.impl(name, function, "CUDA")
        return getattr(torch.ops.memory3, name).default

    return register


def fake(name):
    """Says what an operator would return, for torch.compile and the meta device."""
    return torch.library.register_fake(f"memory3::{name}", lib=_memory3)


def _strides(name, *tensors):
    """The strides of rows of head_dim numbers, of one tensor after another, as C takes them."""
    strides = []
    for tensor in tensors:
        *between_rows, one = tensor.stride()
        if one != 1 or any(stride % 8 != 0 for stride in between_rows):
            raise ValueError(f"kernels.{name}: no rows of {tensor.shape[-1]}: {tensor.stride()}")
        strides += between_rows
    return strides


def _memory_sizes(strides, k, v, q, recall, chunk_len, n_header):
    """The numbers that both functions of memory attention end with."""
    batch, heads, n, head_dim = q.shape
    pool, kv_heads, slots, _ = k.shape
    n_chunks, n_recall = recall.shape[1:]
    if k.stride() != v.stride() or not k[0].is_contiguous():
        raise ValueError(f"kernels.memory_attention: keys of strides {k.stride()}, {v.stride()}")
    strides.append(k.stride(0))  # in a pool, other layers lie between the memories of this one
    sizes = [batch, pool, heads, kv_heads, n, head_dim, slots, n_chunks, n_recall]
    return [_array(strides), *sizes, chunk_len, n_header]


def _begin(tensor):
    """The first row of a tensor (B, H, n, dh): C is told where it begins, and its strides."""
    return tensor[0, 0, 0]


def _array(numbers):
    """Numbers as an array of C's 64-bit integers: strides, in a long batch, go beyond 32 bits."""
    return (ctypes.c_longlong * len(numbers))(*numbers)


@operator(mutates=("out", "lse"))
def memory_attention(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    recall: Tensor,
    chunk_len: int,
    n_header: int,
) -> None:
    """memory.memory_attention, where the shapes are explained; in place.

    q and out: any strides between rows, multiples of 8; k and v: any from memory to memory. count
    (M, Hkv).
    """
    memory_attention_by("memory_attention", out, lse, q, k, v, count, recall, chunk_len, n_header)


def memory_attention_by(function, out, lse, q, k, v, count, recall, chunk_len, n_header):
    """memory_attention by the C function of this name: kernels.cu has a plain one, too."""
    strides = _strides(function, q, out)
    sizes = _memory_sizes(strides, k, v, q, recall, chunk_len, n_header)
    bf16 = [_begin(out), _begin(q), k[0], v[0]]
    _run(function, q.device, sizes, bf16=bf16, f32=[lse], i64=[count, recall])


@fake("memory_attention")
def _(*arguments):
    return None


@operator(mutates=("dq",))
def memory_attention_backward(
    dq: Tensor,
    dout: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    recall: Tensor,
    chunk_len: int,
    n_header: int,
) -> tuple[Tensor, Tensor]:
    """memory.memory_attention_backward. The same bits in every run: uses are added in order.

    dq, dout, q and out: any strides between rows, multiples of 8.
    """
    # where the table names memory m: uses[first[m] : first[m + 1]]
    memories, uses = recall.flatten().sort(stable=True)  # (B*c*R,) twice
    rows = torch.arange(len(k) + 1, device=q.device)
    first = torch.searchsorted(memories, rows)  # (M + 1,)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    delta = torch.empty_like(lse)  # (B, H, P+T): out . dout, from one kernel to the next
    strides = _strides("memory_attention_backward", q, out, dout, dq)
    sizes = _memory_sizes(strides, k, v, q, recall, chunk_len, n_header)
    bf16 = [_begin(dq), _begin(dout), _begin(out), dk, dv, _begin(q), k[0], v[0]]
    i64 = [count, recall, uses, first]
    _run("memory_attention_backward", q.device, sizes, bf16=bf16, f32=[delta, lse], i64=i64)
    return dk, dv


@fake("memory_attention_backward")
def _(dq, dout, q, out, lse, k, v, *rest):
    return k.new_empty(k.shape), v.new_empty(v.shape)


@operator(mutates=("keys", "values"))
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    length: Tensor,
    first: int,
    slots: int,
) -> Tensor:
    """memory.decode_attention. The first stride of q, k, v and two of keys and values are free.

    first: where the slots begin; valid (B, Hkv, slots): None without slots.
    """
    batch, heads, head_dim = q.shape
    kv_heads, n_keys = keys.shape[1:3]
    if values.stride() != keys.stride() or not keys[0, 0].is_contiguous():
        raise ValueError(f"kernels.cu: keys have strides {keys.stride()}, values {values.stride()}")
    strides = [q.stride(0), k.stride(0), v.stride(0), *keys.stride()[:2]]
    # Parts of 64 keys or more, and only as many as keep a GPU of some 130 units busy
    most_parts = math.ceil(n_keys / 64)
    enough_parts = 512 // (batch * kv_heads)
    parts = max(1, min(most_parts, enough_parts))
    y = q.new_empty(q.shape)  # (B, H, dh)
    # each part's own output and lse, before they are merged
    n_scratch = batch * heads * parts * (head_dim + 1)
    scratch = q.new_empty(n_scratch, dtype=F32)
    sizes = [_array(strides), batch, heads, kv_heads, n_keys, head_dim, first, slots, parts]
    first_keys = keys[0, 0]
    first_values = values[0, 0]
    bf16 = [y, q[0], k[0], v[0], first_keys, first_values]
    tensors = dict(bf16=bf16, f32=[scratch], i64=[length], mask=[valid])
    _run("decode_attention", q.device, sizes, **tensors)
    return y


@fake("decode_attention")
def _(q, *rest):
    return q.new_empty(q.shape)


@operator(mutates=("kv",))
def decode_codes(
    kv: Tensor, codes: Tensor, table: Tensor, fields: Tensor, rows: Tensor, first: int
) -> None:
    """memory.fill_slots of codes (n, Lm, 2, Hkv, S, bytes) uint8. kv (Lm, 2, B, Hkv, N, dh).

    table (codes' rows, dh) float32; fields (numbers a code, 3) int32: codec.fields beside
    codec.first; rows (B, R): whose codes go to the keys from first + r*S on, -1 = nobody's.
    """
    n_layers, _, batch, kv_heads, n_keys, head_dim = kv.shape
    slots, code_bytes = codes.shape[-2:]
    n_recall = rows.shape[1]
    n_fields = len(fields)
    sizes = [n_layers, batch, kv_heads, n_keys, head_dim, slots, code_bytes, n_fields, n_recall]
    sizes.append(first)
    tensors = dict(bf16=[kv], u8=[codes], f32=[table], i32=[fields], i64=[rows])
    _run("decode_codes", kv.device, sizes, **tensors)


@fake("decode_codes")
def _(*arguments):
    return None


@operator()
def select(q: Tensor, k: Tensor, mask: Tensor, s: int, approximate: bool) -> tuple[Tensor, Tensor]:
    """memory.token_weights and memory.select_tokens: (N, Hkv, n) float32 and (N, Hkv, s) int64."""
    batch, heads, n, head_dim = q.shape
    kv_heads = k.shape[1]
    weights = q.new_empty((batch, kv_heads, n), dtype=F32)  # (N, Hkv, n)
    chosen = q.new_empty((batch, kv_heads, s), dtype=I64)  # (N, Hkv, s)
    sizes = [batch, heads, kv_heads, n, head_dim, s, int(approximate)]
    tensors = dict(bf16=[q, k], f32=[weights], i64=[chosen], mask=[mask])
    _run("select_tokens", q.device, sizes, **tensors)
    return weights, chosen


@fake("select")
def _(q, k, mask, s, approximate):
    weights = q.new_empty(k.shape[:3], dtype=F32)
    return weights, q.new_empty((*k.shape[:2], s), dtype=I64)
