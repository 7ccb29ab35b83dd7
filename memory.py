"""The explicit memory: which tokens it keeps, and how it is read.

    writing    token_weights -> select_tokens -> Memories          sec. 3.3
    reading    chunk_attention: memories, header and causal context in one softmax      eq. 3.1

Shapes are named as at the top of model.py. Nothing here has parameters: a memory is made with the
decoder's own weights. kernels.cu has some of these functions again, for CUDA; the ones here define
what it must compute.
"""

import math
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
    count (M,) int64: how many of the S slots are filled (short references fill fewer).
    """

    kv: torch.Tensor
    count: torch.Tensor

    def __len__(self):
        """M, the number of memories."""
        return len(self.kv)

    def __getitem__(self, rows):
        """The pool of these rows: a slice, a list or a tensor of indices."""
        return Memories(self.kv[rows], self.count[rows])

    @staticmethod
    def empty(config, device="cpu"):
        """A pool without memories: only header and context are read (Table C.1)."""
        kv = torch.zeros((0, *config.memory_shape), device=device)
        count = torch.zeros(0, dtype=torch.int64, device=device)
        return Memories(kv, count)

    @staticmethod
    def cat(pools):
        """Joins several pools, in their order."""
        kv = torch.cat([pool.kv for pool in pools])
        count = torch.cat([pool.count for pool in pools])
        return Memories(kv, count)


# -- Which heads keep memories -----------------------------------------------------------------
#
# All key-value heads of the memory layers do, unless Config.memory_heads names some of them (the
# paper's Remark 3.3). A pool has a place for every head, so that eq. (3.1) is the same for all: a
# head that keeps nothing has no slot filled. On disk only the heads that keep something take room.
# `heads` is Config.kept_heads: pairs (index of a memory layer, key-value head), None = all.


def filled_slots(count, config):
    """How many slots of each head of each memory are filled: count (M,) -> (Lm, M, Hkv)."""
    n_layers, _, kv_heads, _, _ = config.memory_shape
    count = count[None, :, None].expand(n_layers, -1, kv_heads)  # (Lm, M, Hkv)
    if config.kept_heads is not None:
        keeps = torch.zeros(n_layers, kv_heads, dtype=torch.int64)
        for i, h in config.kept_heads:
            keeps[i, h] = 1
        count = count * keeps.to(count.device)[:, None]
    return count.contiguous()


def pack_heads(kv, heads):
    """The part of a pool that goes to disk: kv (M, Lm, 2, Hkv, S, x) -> (M, K, 2, S, x).

    K is the number of pairs in `heads`, x that of numbers or bytes of a vector. If all heads keep
    memories, the record is kv itself.
    """
    if heads is None:
        return kv
    return torch.stack([kv[:, i, :, h] for i, h in heads], 1)


def unpack_heads(packed, heads, n_layers, kv_heads):
    """Undoes pack_heads: (M, K, 2, S, x) -> (M, Lm, 2, Hkv, S, x), zeros where nothing is kept."""
    if heads is None:
        return packed
    pool_size, _, _, slots, width = packed.shape
    kv = packed.new_zeros((pool_size, n_layers, 2, kv_heads, slots, width))
    for place, (i, h) in enumerate(heads):
        kv[:, i, :, h] = packed[:, place]
    return kv


# -- Writing: which tokens of a reference are worth keeping -----------------------------------


def token_weights(q, k, mask, approximate=False):
    """How much attention each token of a reference receives from all of it (sec. 3.3).

        w_j = sum_i softmax_j(q_i . k_j / sqrt(dh))         i, j over the reference's own tokens

    summed over the query heads that share a key-value head (the paper leaves this open).
    q (N, H, n, dh), k (N, Hkv, n, dh): before RoPE and without a causal mask, for a token must have
    the same chance to be kept wherever it stands. mask (N, n) bool: True where a real token is;
    header and padding are neither i nor j. approximate: the paper's faster weights, exp(score)
    without the division of the softmax. Here one constant for each key-value head is subtracted
    from the scores first, so that exp cannot overflow; the order of the weights stays the same, but
    for those e^87 times smaller than the largest, which are zero.
    Returns (N, Hkv, n) float32, zero at masked tokens. (Sums in bfloat16 would change a fifth of
    the choices.) With q = 0, each of 3 tokens receives 1/3 from each of the 3:

    >>> token_weights(torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 4, 2), torch.arange(4)[None] < 3)
    tensor([[[1., 1., 1., 0.]]])
    """
    kv_heads = k.shape[1]
    head_dim = k.shape[3]
    q = q.float().unflatten(1, (kv_heads, -1))  # (N, Hkv, G, n, dh)
    k = k.float().unsqueeze(2)  # (N, Hkv, 1, n, dh)
    device = "cpu" if q.is_meta else q.device.type
    with torch.autocast(device, enabled=False):  # else the product would be rounded to bfloat16
        scores = q @ k.mT  # (N, Hkv, G, n, n): rows i, columns j
    scores /= math.sqrt(head_dim)

    i_is_token = mask[:, None, None, :, None]  # (N, 1, 1, n, 1)
    j_is_token = mask[:, None, None, None, :]  # (N, 1, 1, 1, n)
    scores.masked_fill_(~(i_is_token & j_is_token), -math.inf)
    if approximate:
        peak = scores.amax((2, 3, 4), keepdim=True)  # (N, Hkv, 1, 1, 1)
        peak = peak.clamp(min=torch.finfo(torch.float32).min)  # -inf in an empty reference
        a = (scores - peak).exp()
    else:
        a = scores.softmax(-1)  # the paper's a~_{i,j}
        a = a.masked_fill(~i_is_token, 0.0)  # nan until now: where i is padding, it gives nothing
    return a.sum((2, 3))  # over the query heads and over i: w_j, (N, Hkv, n)


def select_tokens(weights, mask, s):
    """The s tokens of largest weight for each reference and key-value head, in ascending order.

    weights (N, Hkv, n), mask (N, n). Ties go to the lower index. Returns indices (N, Hkv, s) int64,
    -1 at the end where a reference has fewer than s tokens (it then keeps them all).

    >>> w = torch.tensor([[[.1, .5, .2, .5, .9]]])
    >>> select_tokens(w, torch.tensor([[True, True, True, True, False]]), 3)
    tensor([[[1, 2, 3]]])
    """
    n = weights.shape[-1]
    mask = mask[:, None].expand_as(weights)  # (N, Hkv, n)
    weights = weights.masked_fill(~mask, -math.inf)
    order = weights.argsort(dim=-1, descending=True, stable=True)  # (N, Hkv, n)
    top = order[..., :s]  # (N, Hkv, min(s, n))
    is_token = mask.gather(-1, top)
    top = top.masked_fill(~is_token, n)  # padding: larger than any index, so that ...
    top = top.sort(dim=-1).values  # ... it comes last
    top = top.masked_fill(top == n, -1)
    return F.pad(top, (0, max(0, s - n)), value=-1)  # (N, Hkv, s)


def keep_tokens(q, k, mask, s, approximate=False, selection=1):
    """The tokens that each key-value head of each reference keeps: indices (N, Hkv, s), -1 = none.

    q, k, mask, approximate: see token_weights. selection (Config.selection): the number of the
    rule; 1 is that of sec. 3.3. If you change the rule, give it the next number, here and in the
    Config: then memories chosen by different rules have different fingerprints, and kernels.cu,
    which knows only one rule, is not used for another. UserError for an unknown rule.
    """
    check(selection == 1, f"selection {selection}: memory.keep_tokens knows only rule 1")
    group = q.shape[1] // k.shape[1]
    n_tokens = q.shape[2]
    if selection == kernels.SELECTION and runs_kernel(q, group, n_tokens):
        _, index = kernels.select(q.contiguous(), k.contiguous(), mask, s, approximate)
        return index
    weights = token_weights(q, k, mask, approximate)  # (N, Hkv, n)
    return select_tokens(weights, mask, s)


# -- Reading: which code computes attention ----------------------------------------------------


def attention_path(device, dtype, n, dh=64, group=1, keys=0):
    """Which code computes attention over n tokens, and why: every entry point prints it.

    "math" is plain products; "cpu-flash", "flash" and "cudnn" are PyTorch's fused attention;
    "kernel" is "flash" or "cudnn" for the context and kernels.cu for the memories.
    dh: numbers of a head; group: H/Hkv; keys: memory keys that a query reads, R*S, 0 = none.
    """
    # Measured, forward and backward, 4 heads of 32, one thread: time of fused / plain is 6.5, 4.9,
    # 2.1, 1.45 at n = 39, 128, 256, 512 in bfloat16 (AMX); 1.18, 0.92, 0.57 at n = 39, 64, 256 in
    # float32. So on a CPU plain products compute up to so many tokens:
    most_plain = 512 if dtype == torch.bfloat16 else 63
    if device.type == "cpu" and n > most_plain:
        return "cpu-flash", f"more than {most_plain} tokens in {dtype}"
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not half or dh % 8 != 0:
        return "math", f"{n} tokens in {dtype}, heads of {dh}, on {device.type}"
    there, why = kernels.available(device)
    if not there:
        return fused_on_cuda(device), f"CUDA, {dtype}; {why}"
    if keys == 0 or not kernels.fits(dtype, dh, group, keys):
        return fused_on_cuda(device), f"CUDA, {dtype}; nothing for kernels.cu"
    return "kernel", f"{why} for the memories, {fused_on_cuda(device)} for the context"


def fused_on_cuda(device):
    """Which of PyTorch's fused attentions is faster on this GPU: "cudnn" from Hopper on."""
    # Measured on an H200, 4 x 2048 tokens, 40 heads of 80, forward + backward: cuDNN takes
    # 0.34 + 1.05 ms, flash 0.53 + 1.69 ms.
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0):
        return "cudnn"
    return "flash"


def runs_kernel(x, group, keys=1):
    """Whether kernels.cu takes x (..., dh), with `group` query heads a key-value head."""
    path, _ = attention_path(x.device, x.dtype, 1, x.shape[-1], group, keys)
    return path == "kernel"


# -- Reading: the causal part -------------------------------------------------------------------


def causal_attention(q, k, v):
    """The attention of a plain decoder. q (B, H, n, dh), k v (B, Hkv, n, dh) -> (B, H, n, dh)."""
    path, _ = attention_path(q.device, q.dtype, q.shape[2], q.shape[3])
    if path == "math":
        p = _causal_scores(q, k).softmax(-1)  # (B, Hkv, G, n, n)
        y = p @ v.unsqueeze(2)  # (B, Hkv, G, n, dh)
        return y.flatten(1, 2)  # (B, H, n, dh)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _causal_scores(q, k):
    """q . k / sqrt(dh), -inf where the key comes later: (B, Hkv, G, n, n)."""
    n, head_dim = q.shape[2:]
    minus_inf = torch.full((n, n), -math.inf, dtype=q.dtype, device=q.device)
    future = minus_inf.triu(1)  # -inf above the diagonal, 0 elsewhere
    q = q.unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, n, dh)
    k = k.unsqueeze(2)  # (B, Hkv, 1, n, dh)
    return q / math.sqrt(head_dim) @ k.mT + future


def _causal_forward(q, k, v, path):
    """-> out (B, H, n, dh), lse (B, H, n), and what else the backward of this path needs.

    lse: the logarithm of the sum of exp(score) over the keys of each query.
    """
    if path == "cpu-flash":
        op = aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = op(q, k, v, is_causal=True)
        return out, lse, ()
    if path == "flash":
        op = aten._scaled_dot_product_flash_attention
        out, lse, *saved, _ = op(q, k, v, is_causal=True)
        return out, lse, saved  # lengths, and the random state of a dropout that is off
    if path == "cudnn":
        op = aten._scaled_dot_product_cudnn_attention
        out, lse, *saved, _ = op(q, k, v, None, True, is_causal=True)  # no bias; return the lse
        return out, lse.view(q.shape[:3]), saved  # as for flash
    scores = _causal_scores(q, k)  # (B, Hkv, G, n, n)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)  # (B, Hkv, G, n)
    p = (scores - lse.unsqueeze(-1)).exp().to(v.dtype)
    out = p @ v.unsqueeze(2)  # (B, Hkv, G, n, dh)
    return out.flatten(1, 2), lse.flatten(1, 2), ()


def _causal_backward(dout, q, k, v, out, lse, path, saved):
    """dk, dv, and the causal part's share of dq, given the merged out and lse -> dq, dk, dv."""
    if path == "cpu-flash":
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return op(dout, q, k, v, out, lse, 0.0, True)
    if path == "flash":
        *lengths, seed, offset = saved
        op = aten._scaled_dot_product_flash_attention_backward
        return op(dout, q, k, v, out, lse, *lengths, 0.0, True, seed, offset)
    if path == "cudnn":
        *lengths, seed, offset = saved
        op = aten._scaled_dot_product_cudnn_attention_backward
        lse = lse.unsqueeze(-1)  # (B, H, n, 1)
        return op(dout, q, k, v, out, lse, seed, offset, None, *lengths, 0.0, True)
    scores = _causal_scores(q, k)  # (B, Hkv, G, n, n)
    heads = scores.shape[1:3]
    q = q.unflatten(1, heads)  # (B, Hkv, G, n, dh)
    dout = dout.unflatten(1, heads)  # (B, Hkv, G, n, dh)
    out = out.unflatten(1, heads)  # (B, Hkv, G, n, dh)
    lse = lse.unflatten(1, heads)  # (B, Hkv, G, n)
    p = (scores - lse.unsqueeze(-1)).exp().to(q.dtype)
    delta = (dout * out).sum(-1, keepdim=True)  # (B, Hkv, G, n, 1)
    dp = dout @ v.unsqueeze(2).mT - delta  # (B, Hkv, G, n, n)
    ds = p * dp / math.sqrt(q.shape[-1])
    dq = ds @ k.unsqueeze(2)  # (B, Hkv, G, n, dh)
    dk = (ds.mT @ q).sum(2)  # over the group's queries: (B, Hkv, n, dh)
    dv = (p.mT @ dout).sum(2)
    return dq.flatten(1, 2), dk, dv


# -- Reading: chunk attention ------------------------------------------------------------------
#
# Every context token attends [memories of its chunk | header + causal context] in one softmax. A
# mask over all of that would be nearly all False, and no fused kernel takes it. But a softmax over
# two sets of keys is two softmaxes, each weighted by its share of the sum. With lse, the logarithm
# of the sum of exp(score):
#
#     lse = log(exp(lse_1) + exp(lse_2))        out = exp(lse_1-lse) out_1 + exp(lse_2-lse) out_2
#
# so the causal part goes to PyTorch's fused attention and the memory part, C queries by R*S keys,
# is a small batched product, or our kernel. The backward needs no new mathematics: the gradient of
# a softmax is p * (dp - sum(out * dout)) with p = exp(score - lse), so each part's own backward,
# given the MERGED out and lse, is exactly its share. (Autograd of the two calls would be wrong: it
# knows no gradient of lse.)


def memory_attention(out, lse, q, mem_k, mem_v, count, recall, chunk_len, n_header):
    """The memories' part of eq. (3.1): merges it into the causal part, in place.

    out (B, H, P+T, dh) and lse (B, H, P+T) come in as the causal part's and go out as those of the
    whole softmax. The header attends no memory. The other arguments: see chunk_attention.
    """
    kv_heads = mem_k.shape[1]
    queries = by_chunk(q, kv_heads, chunk_len, n_header)  # (B*c, Hkv, G*C, dh)
    keys = recalled(mem_k, recall)  # (B*c, Hkv, R*S, dh): concat(K_0, ..., K_4) of eq. (3.1)
    values = recalled(mem_v, recall)  # (B*c, Hkv, R*S, dh)
    empty = empty_slots(count, recall, mem_k)  # (B*c, Hkv, 1, R*S)
    scores = memory_scores(queries, keys, empty, lse.dtype)  # (B*c, Hkv, G*C, R*S)
    memory_lse = scores.logsumexp(-1, keepdim=True)  # (B*c, Hkv, G*C, 1)

    causal_lse = lse[:, :, n_header:, None].clone()  # (B, H, T, 1)
    merged_lse = torch.logaddexp(causal_lse, by_token(memory_lse, causal_lse))
    lse[:, :, n_header:] = merged_lse.squeeze(-1)

    lse_by_chunk = by_chunk(lse.unsqueeze(-1), kv_heads, chunk_len, n_header)  # (B*c, Hkv, G*C, 1)
    scores -= lse_by_chunk
    p = scores.exp_().to(values.dtype)  # each slot's share of the whole softmax
    memory_out = by_token(p @ values, causal_lse)  # (B, H, T, dh)
    causal_share = (causal_lse - merged_lse).exp()
    causal_out = out[:, :, n_header:] * causal_share  # (B, H, T, dh), in the precision of lse
    out[:, :, n_header:] = causal_out + memory_out


def memory_attention_backward(
    dq, dout, q, out, lse, mem_k, mem_v, count, recall, chunk_len, n_header
):
    """The memories' share of the gradients, given the merged out and lse.

    Adds to dq (B, H, P+T, dh) in place; returns dmem_k and dmem_v (M, Hkv, S, dh).
    """
    kv_heads, slots, head_dim = mem_k.shape[1:]
    delta = (dout * out).sum(-1, keepdim=True)  # (B, H, P+T, 1): sum(out * dout) above
    queries = by_chunk(q, kv_heads, chunk_len, n_header)  # (B*c, Hkv, G*C, dh)
    dout = by_chunk(dout, kv_heads, chunk_len, n_header)  # (B*c, Hkv, G*C, dh)
    delta = by_chunk(delta, kv_heads, chunk_len, n_header)  # (B*c, Hkv, G*C, 1)
    lse = by_chunk(lse.unsqueeze(-1), kv_heads, chunk_len, n_header)  # (B*c, Hkv, G*C, 1)
    keys = recalled(mem_k, recall)  # (B*c, Hkv, R*S, dh)
    values = recalled(mem_v, recall)  # (B*c, Hkv, R*S, dh)
    empty = empty_slots(count, recall, mem_k)  # (B*c, Hkv, 1, R*S)
    scores = memory_scores(queries, keys, empty, lse.dtype)  # (B*c, Hkv, G*C, R*S)

    scores -= lse
    p = scores.exp_().to(q.dtype)  # (B*c, Hkv, G*C, R*S)
    # ds, the gradient of q . k, is p * (dp - delta) / sqrt(dh), made in place
    ds = dout @ values.mT  # dp (B*c, Hkv, G*C, R*S)
    ds -= delta
    ds *= p
    ds /= math.sqrt(head_dim)
    context_dq = dq[:, :, n_header:]  # (B, H, T, dh): a view
    context_dq += by_token(ds @ keys, context_dq)
    dkeys = ds.mT @ queries  # (B*c, Hkv, R*S, dh)
    dvalues = p.mT @ dout
    dmem_k = sum_over_readers(dkeys, mem_k, recall)
    dmem_v = sum_over_readers(dvalues, mem_v, recall)
    return dmem_k, dmem_v


def by_chunk(x, kv_heads, chunk_len, n_header):
    """x (B, H, P+T, e) -> (B*c, Hkv, G*C, e): a row for each chunk, without the header.

    The queries of the G heads of a group lie in one row, since they read the same keys. The last
    chunk is padded with zeros. e is dh, or 1 for the lse.
    """
    x = x[:, :, n_header:]  # (B, H, T, e)
    padding = -x.shape[2] % chunk_len  # so that C divides T + padding
    if padding > 0:
        x = F.pad(x, (0, 0, 0, padding))  # (B, H, c*C, e)
    x = x.unflatten(2, (-1, chunk_len))  # (B, H, c, C, e)
    x = x.transpose(1, 2).flatten(0, 1)  # (B*c, H, C, e)
    x = x.unflatten(1, (kv_heads, -1))  # (B*c, Hkv, G, C, e)
    return x.flatten(2, 3)  # (B*c, Hkv, G*C, e)


def by_token(x, like):
    """Undoes by_chunk: x (B*c, Hkv, G*C, e) -> (B, H, T, e); B, H and T are those of `like`."""
    batch, heads, length = like.shape[:3]
    group = heads // x.shape[1]
    x = x.unflatten(2, (group, -1))  # (B*c, Hkv, G, C, e)
    x = x.flatten(1, 2)  # (B*c, H, C, e)
    x = x.unflatten(0, (batch, -1))  # (B, c, H, C, e)
    x = x.transpose(1, 2).flatten(2, 3)  # (B, H, c*C, e)
    return x[:, :, :length]  # without the padding of the last chunk


def head_rows(recall, kv_heads):
    """What each head of each chunk reads, as rows of a pool in which every head of every memory is
    a row: recall (B, c, R) -> (B*c*Hkv*R,), for a pool (M*Hkv, S, dh).

    -1 in the recall table stands for no memory; memory 0 takes its place, and empty_slots masks it.

    >>> head_rows(torch.tensor([[[2, -1]]]), kv_heads=3)
    tensor([6, 0, 7, 1, 8, 2])
    """
    memories = recall.clamp(min=0).flatten(0, 1)  # (B*c, R)
    head = torch.arange(kv_heads, device=recall.device)  # (Hkv,)
    rows = memories.unsqueeze(1) * kv_heads + head.unsqueeze(1)  # (B*c, Hkv, R)
    return rows.flatten()


def recalled(mem, recall):
    """The keys, or values, that each chunk reads: mem (M, Hkv, S, dh) -> (B*c, Hkv, R*S, dh)."""
    kv_heads = mem.shape[1]
    x = mem.flatten(0, 1)  # (M*Hkv, S, dh)
    x = x.index_select(0, head_rows(recall, kv_heads))  # (B*c*Hkv*R, S, dh)
    x = x.unflatten(0, (-1, kv_heads, recall.shape[2]))  # (B*c, Hkv, R, S, dh)
    return x.flatten(2, 3)  # (B*c, Hkv, R*S, dh)


def empty_slots(count, recall, mem):
    """Which of a chunk's R*S slots hold nothing: count (M, Hkv) -> (B*c, Hkv, 1, R*S) bool."""
    rows = recall.flatten(0, 1)  # (B*c, R)
    filled = count[rows.clamp(min=0)]  # (B*c, R, Hkv)
    filled = filled.masked_fill(rows.unsqueeze(-1) < 0, 0)
    slot = torch.arange(mem.shape[2], device=mem.device)  # (S,)
    empty = slot >= filled.unsqueeze(-1)  # (B*c, R, Hkv, S)
    empty = empty.transpose(1, 2).flatten(2)  # (B*c, Hkv, R*S)
    return empty.unsqueeze(2)


def memory_scores(queries, keys, empty, dtype):
    """q . k / sqrt(dh), -inf at empty slots: (B*c, Hkv, G*C, R*S) in `dtype`, that of the lse."""
    scores = (queries @ keys.mT).to(dtype)
    scores /= math.sqrt(keys.shape[-1])
    return scores.masked_fill_(empty, -math.inf)


def sum_over_readers(grad, mem, recall):
    """The gradient of the pool (M, Hkv, S, dh) from that of what each chunk read of it.

    grad (B*c, Hkv, R*S, dh). A memory's gradient is the sum over all chunks that read it.
    """
    pool_size, kv_heads, slots = mem.shape[:3]
    rows = head_rows(recall, kv_heads)  # (B*c*Hkv*R,)
    grad = grad.unflatten(2, (-1, slots)).flatten(0, 2)  # (B*c*Hkv*R, S, dh)
    total = torch.zeros_like(mem).flatten(0, 1)  # (M*Hkv, S, dh)
    # where there was no memory, grad is zero: nothing is added to memory 0
    total.index_add_(0, rows, grad)
    return total.unflatten(0, (pool_size, kv_heads))  # (M, Hkv, S, dh)


class _ChunkAttention(torch.autograd.Function):
    """The causal part, the memories' part, and the merge, with the gradients of all three."""

    @staticmethod
    def forward(ctx, q, k, v, mem_k, mem_v, count, recall, chunk_len, n_header, path):
        ctx.on_cuda = path in ("flash", "cudnn", "kernel")
        ctx.use_kernel = path == "kernel"
        if ctx.use_kernel:  # for the memories; on a CPU only in tests, which emulate it there
            path = fused_on_cuda(q.device) if q.is_cuda else "cpu-flash"
        q, k, v = (_rows(x, ctx.on_cuda) for x in (q, k, v))
        mem_k, mem_v = (_rows(x, ctx.on_cuda) for x in (mem_k, mem_v))
        out, lse, saved = _causal_forward(q, k, v, path)
        out = _rows(out, ctx.on_cuda)
        lse = lse.contiguous()
        arguments = (out, lse, q, mem_k, mem_v, count, recall, chunk_len, n_header)
        if ctx.use_kernel:
            kernels.memory_attention(*arguments)
        else:
            memory_attention(*arguments)
        ctx.save_for_backward(q, k, v, out, lse, mem_k, mem_v, count, recall)
        ctx.sizes = (chunk_len, n_header)
        ctx.path = path
        ctx.saved = saved
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, mem_k, mem_v, count, recall = ctx.saved_tensors
        dout = _rows(dout, ctx.on_cuda)
        dq, dk, dv = _causal_backward(dout, q, k, v, out, lse, ctx.path, ctx.saved)
        dq = _rows(dq, ctx.on_cuda)
        memories = (mem_k, mem_v, count, recall)
        arguments = (dq, dout, q, out, lse, *memories, *ctx.sizes)
        if ctx.use_kernel:
            dmem_k, dmem_v = kernels.memory_attention_backward(*arguments)
        else:
            dmem_k, dmem_v = memory_attention_backward(*arguments)
        return dq, dk, dv, dmem_k, dmem_v, None, None, None, None, None


def _rows(x, on_cuda):
    """x (..., dh) as attention takes it: contiguous; on CUDA any strides between rows will do.

    There a copy of all queries would cost as much as reading the memories.
    """
    if on_cuda and x.stride(-1) == 1:
        return x
    return x.contiguous()


def chunk_attention(q, k, v, mem_k, mem_v, count, recall, chunk_len, n_header, path=None):
    """Self-attention in which each chunk of the context also reads its own memories (eq. 3.1).

    q (B, H, P+T, dh), k v (B, Hkv, P+T, dh): header then context, after RoPE.
    mem_k mem_v (M, Hkv, S, dh): one layer of the pool; count (M,): filled slots of each memory, or
    (M, Hkv) where its heads differ.
    recall (B, c, R) int64: recall[b, i] are the memories that chunk i of sequence b reads, context
    tokens [iC, (i+1)C); -1 = none. Their order does not matter: all share one interval of positions
    (sec. 3.2).
    path: forces one of attention_path's names (for tests). Returns (B, H, P+T, dh). UserError for
    a table of another shape, or for one that names memories of an empty pool.
    """
    batch, heads, length, head_dim = q.shape
    pool_size, kv_heads, slots = mem_k.shape[:3]
    n_recall = recall.shape[2]
    n_context = length - n_header
    n_chunks = math.ceil(n_context / chunk_len)
    check(
        recall.shape[:2] == (batch, n_chunks),
        f"recall has shape {tuple(recall.shape)}; {batch} sequences of {n_context} tokens in chunks"
        f" of {chunk_len} need ({batch}, {n_chunks}, R)",
    )
    if n_recall == 0 or pool_size == 0:
        check(not (recall >= 0).any(), "recall names memories, but the pool is empty")
        return causal_attention(q, k, v)
    if path is None:
        group = heads // kv_heads
        keys = n_recall * slots
        path, _ = attention_path(q.device, q.dtype, length, head_dim, group, keys)
    if count.dim() == 1:
        count = count[:, None].expand(-1, kv_heads)  # (M, Hkv)
    memories = (mem_k, mem_v, count.contiguous(), recall.contiguous())
    return _ChunkAttention.apply(q, k, v, *memories, chunk_len, n_header, path)


# -- Reading while generating ------------------------------------------------------------------


def decode_attention(q, k, v, keys, values, valid, length, n_header):
    """Eq. (3.1) for one new token a sequence: adds its k v (B, Hkv, dh) to the cache, attends all.

    q (B, H, dh); keys values (B, Hkv, n_keys, dh): a layer of the cache, changed in place. Returns
    (B, H, dh). Nothing needs merging: a memory layer's cache is [header | memory slots | context].
    valid (B, Hkv, slots) bool: which slots to read; a layer without memories has no slots. length
    (1,): how many keys there are, the new one included; it is the last. What lies beyond is masked
    and not cut off, so that no shape changes and a CUDA graph can be replayed.
    """
    kv_heads, n_keys, head_dim = keys.shape[1:]
    slots = valid.shape[2]
    if runs_kernel(q, q.shape[1] // kv_heads):
        # kernels.cu wants each sequence's heads side by side
        q, k, v = (x if x[0].is_contiguous() else x.contiguous() for x in (q, k, v))
        return kernels.decode_attention(q, k, v, keys, values, valid, length, n_header, slots)
    if q.device.type == "cpu":
        return _decode_on_cpu(q, k, v, keys, values, valid, int(length), n_header)
    keys.index_copy_(2, length - 1, k.unsqueeze(2))
    values.index_copy_(2, length - 1, v.unsqueeze(2))
    q = q.unflatten(1, (kv_heads, -1))  # (B, Hkv, G, dh)
    scores = q @ keys.mT / math.sqrt(head_dim)  # (B, Hkv, G, n_keys)
    slot_scores = scores[..., n_header : n_header + slots]  # a view
    slot_scores.masked_fill_(~valid.unsqueeze(2), -math.inf)
    not_yet = torch.arange(n_keys, device=q.device) >= length  # (n_keys,)
    scores = scores.masked_fill(not_yet, -math.inf)
    y = scores.softmax(-1) @ values  # (B, Hkv, G, dh)
    return y.flatten(1, 2)  # (B, H, dh)


def _decode_on_cpu(q, k, v, keys, values, valid, length, n_header):
    """decode_attention where it costs nothing to know the length, an int here."""
    kv_heads, n_keys, head_dim = keys.shape[1:]
    slots = valid.shape[2]
    keys[:, :, length - 1] = k
    values[:, :, length - 1] = v
    # A cut leaves gaps between the heads, over which a CPU reads two to three times as slowly
    # (measured: 32 sequences, 4 heads of 32, 48 keys of 64). So only what is mostly empty is cut.
    if length < n_keys / 2:
        keys = keys[:, :, :length]
        values = values[:, :, :length]
    q = q.unflatten(1, (kv_heads, -1)) / math.sqrt(head_dim)  # (B, Hkv, G, dh)
    scores = q @ keys.mT  # (B, Hkv, G, n_keys)
    scores[..., length:] = -math.inf
    if slots > 0:
        slot_scores = scores[..., n_header : n_header + slots]  # a view
        slot_scores.masked_fill_(~valid.unsqueeze(2), -math.inf)
    y = scores.softmax(-1) @ values  # (B, Hkv, G, dh)
    return y.flatten(1, 2)  # (B, H, dh)


def fill_slots(kv, memories, table, n_header, codec=None):
    """Writes memories table[b] of a pool into the slots of sequence b, in place.

    kv (Lm, 2, B, Hkv, n_keys, dh): the cache of the memory layers. table (B, R) int64, -1 = none:
    whatever its slots then hold must not be read. codec: if given, memories.kv are its codes.
    """
    if codec and runs_kernel(kv, 1):
        # of each number in a code: its first bit, its bits, and the table's row of its centroid 0
        fields = torch.tensor(codec.fields, dtype=torch.int32, device=kv.device)  # (numbers, 2)
        fields = torch.cat([fields, codec.first[:, None]], 1)  # (numbers, 3)
        table = table.contiguous()
        kernels.decode_codes(kv, memories.kv, codec.table, fields, table, n_header)
        return
    pool = codec.decode(memories.kv) if codec else memories.kv  # (M, Lm, 2, Hkv, S, dh)
    x = pool[table.clamp(min=0)]  # (B, R, Lm, 2, Hkv, S, dh)
    x = x.permute(2, 3, 0, 4, 1, 5, 6)  # (Lm, 2, B, Hkv, R, S, dh)
    x = x.flatten(4, 5)  # (Lm, 2, B, Hkv, R*S, dh)
    end = n_header + x.shape[4]
    kv[..., n_header:end, :] = x
