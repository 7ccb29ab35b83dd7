"""The explicit memory: which tokens it keeps, and how it is read.

    writing    token_weights -> select_tokens -> Memories          sec. 3.3
    reading    chunk_attention: memories, header and causal context in one softmax      eq. 3.1

Shapes are named as at the top of model.py. Nothing here has weights: all is the decoder's own.
"""

import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import kernels
from common import check

aten = torch.ops.aten


@dataclass
class Memories:
    """A pool of M explicit memories.
    kv (M, Lm, 2, Hkv, S, dh): keys (after RoPE) and values of the kept tokens, layer by layer.
    count (M,) int64: how many of the S slots are filled (short references fill fewer)."""

    kv: torch.Tensor
    count: torch.Tensor

    def __len__(self):
        return len(self.kv)

    def __getitem__(self, rows):
        return Memories(self.kv[rows], self.count[rows])

    @staticmethod
    def empty(config, device="cpu"):
        """A pool with nothing in it: header and context are read, no memory is (Table C.1)."""
        kv = torch.zeros((0, *config.memory_shape), device=device)
        return Memories(kv, torch.zeros(0, dtype=torch.int64, device=device))

    @staticmethod
    def cat(pools):
        return Memories(torch.cat([p.kv for p in pools]), torch.cat([p.count for p in pools]))


# -- Writing: which tokens of a reference are worth keeping -----------------------------------


def token_weights(q, k, mask, approximate=False):
    """How much attention each token of a reference receives from all of it (sec. 3.3).

        w_j = sum_i softmax_j(q_i . k_j / sqrt(dh))         i, j over the reference's own tokens

    summed over the query heads that share a key-value head (the paper leaves this open).
    q (N, H, n, dh), k (N, Hkv, n, dh): before RoPE and without a causal mask, for a token must have
    the same chance to be kept wherever it stands. mask (N, n) bool: True where a real token is;
    header and padding are neither i nor j. approximate: exp without the softmax's division, as the
    paper ran it, shifted by one constant a key-value head: no overflow, and the order stays.
    Returns (N, Hkv, n) float32, zero at masked tokens. Sums in bfloat16 would change a fifth of the
    choices. With q = 0 each of 3 tokens gets 1/3 from each:
    >>> token_weights(torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 4, 2), torch.arange(4)[None] < 3)
    tensor([[[1., 1., 1., 0.]]])
    """
    q = q.float().unflatten(1, (k.shape[1], -1))
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):  # or it is bfloat16
        scores = q @ k.float().unsqueeze(2).mT / math.sqrt(q.shape[-1])  # (N, Hkv, H/Hkv, n, n)
    both = mask[:, None, None, :, None] & mask[:, None, None, None, :]  # i and j are real tokens
    scores = scores.masked_fill(~both, -math.inf)
    if approximate:
        peak = scores.amax((2, 3, 4), keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        a = (scores - peak).exp()
    else:
        a = scores.softmax(-1).nan_to_num()  # where i is padding there is nothing to share out
    return a.sum((2, 3))  # over the query heads of the group and over i


def select_tokens(weights, mask, s):
    """The s tokens of largest weight for each reference and key-value head, in ascending order.

    weights (N, Hkv, n), mask (N, n). Ties go to the lower index. Returns indices (N, Hkv, s) int64,
    -1 at the end where a reference has fewer than s tokens (it then keeps them all).
    >>> w = torch.tensor([[[.1, .5, .2, .5, .9]]])
    >>> select_tokens(w, torch.tensor([[True, True, True, True, False]]), 3)
    tensor([[[1, 2, 3]]])
    """
    n, mask = weights.shape[-1], mask[:, None].expand_as(weights)
    order = weights.masked_fill(~mask, -math.inf).sort(dim=-1, descending=True, stable=True)
    top = order.indices[..., :s]
    top = top.masked_fill(~mask.gather(-1, top), n).sort(-1).values  # padding to the end
    return F.pad(top.masked_fill(top == n, -1), (0, max(0, s - n)), value=-1)


def choose_tokens(q, k, mask, s, approximate=False):
    """select_tokens of token_weights: what each key-value head keeps (N, Hkv, s)."""
    if _kernel(q, q.shape[1] // k.shape[1], keys=q.shape[2]):
        return kernels.select(q.contiguous(), k.contiguous(), mask, s, approximate)[1]
    return select_tokens(token_weights(q, k, mask, approximate), mask, s)


# -- Reading: chunk attention ------------------------------------------------------------------
#
# Every context token attends [memories of its chunk | header + causal context] in one softmax. A
# mask over all of that would be nearly all False, and no fused kernel takes it. But a softmax over
# two sets of keys is two softmaxes, weighed by how much each set had to say:
#
#     lse = log(exp(lse_1) + exp(lse_2))        out = exp(lse_1-lse) out_1 + exp(lse_2-lse) out_2
#
# so the causal part goes to PyTorch's fused attention and the memory part, C queries by R*S keys,
# is a small batched product, or our kernel. The backward needs no new mathematics: the gradient of
# a softmax is p * (dp - sum(out * dout)) with p = exp(score - lse), so each part's own backward,
# given the MERGED out and lse, is exactly its share. (Autograd fails: it knows no gradient of lse.)


def attention_path(device, dtype, n, dh=64, group=1, keys=0):
    """Which code computes attention over n tokens, and why: every entry point prints it.
    "math" is plain products; "cpu-flash" and "flash" are PyTorch's fused attention; "kernel" is
    "flash", and kernels.cu for memories. dh numbers a head; group: H/Hkv; keys: R*S, 0 = none."""
    # Measured, forward and backward, 4 heads of 32, one thread: fused / plain takes 6.5, 4.9, 2.1,
    # 1.45 at n = 39, 128, 256, 512 in bfloat16 (AMX), 1.18, 0.92, 0.57 at 39, 64, 256 in float32
    few = 512 if dtype == torch.bfloat16 else 63
    if device.type == "cpu" and n > few:
        return "cpu-flash", f"more than {few} tokens in {dtype}"
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or dh % 8:
        return "math", f"{n} tokens in {dtype}, heads of {dh}, on {device.type}"
    there, why = kernels.available(device)
    if there and keys and kernels.fits(dtype, dh, group, keys):
        return "kernel", why
    return "flash", f"CUDA, {dtype}; {'nothing for kernels.cu' if there else why}"


def _kernel(x, group, keys=1):  # x (..., dh)
    return attention_path(x.device, x.dtype, 1, x.shape[-1], group, keys)[0] == "kernel"


def _causal(q, k, v, path):
    """-> out (B, H, n, dh), lse (B, H, n), and what the backward of this path wants besides."""
    if path == "cpu-flash":
        return *aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True), ()
    if path == "flash":
        out, lse, *saved, _ = aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)
        return out, lse, saved  # lengths and the state of a dropout that there is not
    scores = _causal_scores(q, k)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v.unsqueeze(2)
    return out.flatten(1, 2), lse.flatten(1, 2), ()


def _causal_backward(dout, q, k, v, out, lse, path, saved):
    """The causal part's share of dq, and dk, dv, given the merged out and lse."""
    if path == "cpu-flash":
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(dout, q, k, v, out, lse, 0.0, True)
    if path == "flash":
        *lengths, seed, offset = saved
        backward = aten._scaled_dot_product_flash_attention_backward
        return backward(dout, q, k, v, out, lse, *lengths, 0.0, True, seed, offset)
    p = _causal_scores(q, k)
    q, dout, out, lse = (x.unflatten(1, p.shape[1:3]) for x in (q, dout, out, lse))
    p = (p - lse.unsqueeze(-1)).exp().to(q.dtype)
    dp = dout @ v.unsqueeze(2).mT - (dout * out).sum(-1, keepdim=True)
    ds = p * dp / math.sqrt(q.shape[-1])
    return (ds @ k.unsqueeze(2)).flatten(1, 2), (ds.mT @ q).sum(2), (p.mT @ dout).sum(2)


def _causal_scores(q, k):  # (B, Hkv, G, n, n), -inf above the diagonal; G: H/Hkv
    future = torch.full((q.shape[2],) * 2, -math.inf, dtype=q.dtype, device=q.device).triu(1)
    q = q.unflatten(1, (k.shape[1], -1)) / math.sqrt(q.shape[-1])
    return q @ k.unsqueeze(2).mT + future


def causal_attention(q, k, v):
    """The attention of a plain decoder. q (B, H, n, dh), k v (B, Hkv, n, dh) -> (B, H, n, dh)."""
    if attention_path(q.device, q.dtype, *q.shape[2:])[0] == "math":
        return (_causal_scores(q, k).softmax(-1) @ v.unsqueeze(2)).flatten(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def memory_attention(out, lse, q, mem_k, mem_v, count, recall, C, P):
    """Merges the memories into out (B, H, n, dh) and lse (B, H, n) of the causal part, in place;
    the header attends none. For the rest see chunk_attention. As kernels.memory_attention."""
    _, _, v, scores = _scores(lse.dtype, q, mem_k, mem_v, count, recall, C, P)
    context, before, after = out[:, :, P:], lse[:, :, P:, None].clone(), lse[:, :, P:, None]
    after.copy_(torch.logaddexp(before, _tokens(scores.logsumexp(-1, keepdim=True), context)))
    p = (scores - _chunks(lse.unsqueeze(-1), mem_k.shape[1], C, P)).exp().to(v.dtype)
    merged = context * (before - after).exp()  # float32 for out in bfloat16
    context.copy_(merged.add_(_tokens(p @ v, context)))


def memory_attention_backward(dq, dout, q, out, lse, mem_k, mem_v, count, recall, C, P):
    """The memories' share of the gradients, given the merged out and lse: adds to dq in place,
    returns dmem_k and dmem_v. As kernels.memory_attention_backward."""
    qm, k, v, scores = _scores(lse.dtype, q, mem_k, mem_v, count, recall, C, P)
    each = dout, (dout * out).sum(-1, keepdim=True), lse.unsqueeze(-1)
    dm, delta, lse = (_chunks(x, mem_k.shape[1], C, P) for x in each)
    p = (scores - lse).exp().to(q.dtype)
    ds = p * (dm @ v.mT - delta) / math.sqrt(q.shape[-1])
    dq[:, :, P:] += _tokens(ds @ k, dq[:, :, P:])
    rows, slots = recall.clamp(min=0).flatten(), (recall.shape[2], mem_k.shape[2])
    grads = (x.unflatten(2, slots).transpose(1, 2).flatten(0, 1) for x in (ds.mT @ qm, p.mT @ dm))
    return [torch.zeros_like(mem_k).index_add_(0, rows, x) for x in grads]  # over all its readers


def _scores(dtype, q, mem_k, mem_v, count, recall, C, P):
    """Each chunk is a row of a batch: its q (B*c, Hkv, G*C, dh), its memories k, v (B*c, Hkv, R*S,
    dh), and the scores (B*c, Hkv, G*C, R*S), -inf at slots that are empty. G: H/Hkv."""
    rows, (_, Hkv, S, dh) = recall.clamp(min=0).flatten(0, 1), mem_k.shape  # (B*c, R)
    filled = torch.where(recall.flatten(0, 1) >= 0, count[rows], 0).unsqueeze(-1)
    empty = (torch.arange(S, device=q.device) >= filled).flatten(1)[:, None, None]
    k, v = (x[rows].transpose(1, 2).flatten(2, 3) for x in (mem_k, mem_v))
    q = _chunks(q, Hkv, C, P)
    scores = (q @ k.mT).to(dtype) / math.sqrt(dh)
    return q, k, v, scores.masked_fill(empty, -math.inf)


def _chunks(x, Hkv, C, P):  # (B, H, P+T, d) -> (B*c, Hkv, G*C, d); the last chunk is padded
    x = F.pad(x, (0, 0, -P, (P - x.shape[2]) % C)).unflatten(2, (-1, C))
    return x.transpose(1, 2).flatten(0, 1).unflatten(1, (Hkv, -1)).flatten(2, 3)


def _tokens(x, like):  # back, like (B, H, T, d)
    B, H, T, _ = like.shape
    x = x.unflatten(2, (H // x.shape[1], -1)).flatten(1, 2).unflatten(0, (B, -1))
    return x.transpose(1, 2).flatten(2, 3)[:, :, :T]  # of (B, c, H, C, d)


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mem_k, mem_v, count, recall, chunk_len, n_header, path):
        q, k, v, mem_k, mem_v = (x.contiguous() for x in (q, k, v, mem_k, mem_v))
        code = sys.modules[__name__]
        if path == "kernel":  # on a CPU where a test has put it there
            path, code = "flash" if q.is_cuda else "cpu-flash", kernels
        out, lse, saved = _causal(q, k, v, path)
        out, lse = out.contiguous(), lse.contiguous()
        code.memory_attention(out, lse, q, mem_k, mem_v, count, recall, chunk_len, n_header)
        ctx.save_for_backward(q, k, v, out, lse, mem_k, mem_v, count, recall)
        ctx.rest = chunk_len, n_header, path, saved, code
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, *memories = ctx.saved_tensors
        chunk_len, n_header, path, saved, code = ctx.rest
        dout = dout.contiguous()
        dq, dk, dv = _causal_backward(dout, q, k, v, out, lse, path, saved)
        add, dq = code.memory_attention_backward, dq.contiguous()
        dmem = add(dq, dout, q, out, lse, *memories, chunk_len, n_header)
        return dq, dk, dv, *dmem, None, None, None, None, None


def chunk_attention(q, k, v, mem_k, mem_v, count, recall, chunk_len, n_header, path=None):
    """Self-attention in which each chunk of the context also reads its own memories (eq. 3.1).
    q (B, H, P+T, dh), k v (B, Hkv, P+T, dh): header then context, after RoPE.
    mem_k mem_v (M, Hkv, S, dh): one layer of the pool; count (M,): filled slots of each memory.
    recall (B, c, R) int64: which memories chunk c = context tokens [cC, (c+1)C) reads, -1 = none;
    c = ceil(T / C). They need no order and no mask among each other (parallel positions, sec. 3.2).
    path: forces one of attention_path's names (tests). Returns (B, H, P+T, dh)."""
    (B, H, n, dh), (M, Hkv, S, _) = q.shape, mem_k.shape
    c = -(-(n - n_header) // chunk_len)
    has = f"recall has shape {tuple(recall.shape)}; {B} sequences of {n - n_header} tokens"
    check(recall.shape[:2] == (B, c), f"{has} in chunks of {chunk_len} need ({B}, {c}, R)")
    if recall.shape[2] == 0 or M == 0:
        check(not (recall >= 0).any(), "recall names memories, but the pool is empty")
        return causal_attention(q, k, v)
    path = path or attention_path(q.device, q.dtype, n, dh, H // Hkv, recall.shape[2] * S)[0]
    memories = mem_k, mem_v, count, recall.contiguous()
    return _ChunkAttention.apply(q, k, v, *memories, chunk_len, n_header, path)


def decode_attention(q, keys, values, valid, length, n_header):
    """One new token a sequence. q (B, H, dh); keys values (B, Hkv, N, dh) -> (B, H, dh). There is
    nothing to merge: the cache of a memory layer is [header | memory slots | context].
    valid (B, slots) bool: the slots to be read; a layer without memories has none. length (1,):
    keys so far, with the new one; the rest is masked: no shape changes, a CUDA graph replays."""
    Hkv, slots = keys.shape[1], valid.shape[1]
    if _kernel(q, q.shape[1] // Hkv):
        q = q.contiguous()
        return kernels.decode_attention(q, keys, values, valid, length, n_header, slots)
    scores = q.unflatten(1, (Hkv, -1)) @ keys.mT / math.sqrt(q.shape[-1])  # (B, Hkv, G, N)
    scores[..., n_header : n_header + slots].masked_fill_(~valid[:, None, None], -math.inf)
    scores.masked_fill_(torch.arange(keys.shape[2], device=q.device) >= length, -math.inf)
    return (scores.softmax(-1) @ values).flatten(1, 2)


def fill_slots(kv, memories, table, n_header, codec=None):
    """Writes memories table[b] of a pool into the slots of sequence b, in place.
    kv (Lm, 2, B, Hkv, N, dh): the cache of the memory layers; table (B, R) int64, -1 = none (what
    its slots then hold is not to be read). codec: memories.kv are its codes."""
    if codec and _kernel(kv, 1):
        fields = torch.tensor(codec.fields, dtype=torch.int32, device=kv.device)
        fields, table = torch.cat([fields, codec.first[:, None]], 1), table.contiguous()
        return kernels.decode_codes(kv, memories.kv, codec.table, fields, table, n_header)
    x = codec.decode(memories.kv) if codec else memories.kv
    x = x[table.clamp(min=0)].permute(2, 3, 0, 4, 1, 5, 6).flatten(4, 5)
    kv[..., n_header : n_header + x.shape[4], :] = x  # (Lm, 2, B, Hkv, R*S, dh)
