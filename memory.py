"""The explicit memory: which tokens it keeps, how it is read, and the bank that holds it on disk.

    writing    token_weights -> select_tokens -> Memories          sec. 3.3
    reading    chunk_attention: memories, header and causal context in one softmax      eq. 3.1
    storing    MemoryBank: fixed-size records, checksums, a cache in RAM               sec. 3.1, 3.3

Shapes are named as at the top of model.py. Nothing here has weights: all is the decoder's own.
"""

import json
import math
import os
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import corpus
import kernels
from corpus import need
from quantize import Codec

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
    need(recall.shape[:2] == (B, c), f"{has} in chunks of {chunk_len} need ({B}, {c}, R)")
    if recall.shape[2] == 0 or M == 0:
        need(not (recall >= 0).any(), "recall names memories, but the pool is empty")
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

# -- Storing: the bank ------------------------------------------------------------------------

FORMAT = ["memory3 bank", 2]  # and its version
DELETED = 255  # in count.bin
THREADS = 8  # an SSD answers many reads at a time
WINDOW = 64 << 20  # bytes that are read at a time where the whole bank is

class MemoryBank:
    """The memories of a whole knowledge base, on disk: row i is that of reference i (sec. 3.1).

        meta.json       shape, dtype, codec, references, and whose memories these are
        memories.bin    n records of one size, (Lm, 2, Hkv, S, dh) numbers or (Lm, 2, Hkv, S) codes
        count.bin       uint8 each: filled slots; 255 = deleted
        crc.bin         uint32 each: checksum of the record and its count; 0 = not written
        codec.*         where quantized (sec. 3.3)

    A record is on disk before its checksum is, so a writer may die at any moment: what it left half
    done counts as missing. With a model, `write` makes all missing records (warm start), `recall`
    those that it needs (cold start); without one the bank is read-only. Only the model that wrote
    memories can read them (Remark A.1): meta.json has its fingerprint. One process writes at once,
    and one thread recalls.

        bank = MemoryBank.create("out/kb.bank", model, corpus.References.open("data/cities/kb"))
        bank.write()
        logits, _ = model(tokens, None, bank.recall([17, 4, 17]), recall)   # a pool of 3
    """

    def __init__(self, path, meta, references, model, codec, cache):
        self.path, self.meta, self.references, self.model = path, meta, references, model
        self.shape, self.dtype = tuple(meta["shape"]), getattr(torch, meta["dtype"])
        self.record_bytes = meta["record_bytes"]
        self.vector = self.record_bytes // math.prod(self.shape[:-1])  # bytes of a key, of a value
        self.window = max(1, WINDOW // self.record_bytes)
        self.device = model.device if model else torch.device("cpu")
        self.codec = codec and codec.to(self.device)
        self.cache, self.cache_size = {}, cache  # id -> its record, last used last
        self.hits = self.misses = self.encoded = 0
        self.file = open(path / "memories.bin", "r+b" if model else "rb", buffering=0)
        self.threads, self.room = ThreadPoolExecutor(THREADS), ()
        self._map()

    def _map(self):
        mode, n = "r+" if self.model else "r", len(self.references)
        self.count = np.memmap(self.path / "count.bin", np.uint8, mode, shape=n)
        self.crc = np.memmap(self.path / "crc.bin", np.dtype("<u4"), mode, shape=n)

    def __len__(self):
        return len(self.references)

    @staticmethod
    def create(path, model, references, dtype="bfloat16", codec=None):
        """An empty bank for the memories of corpus.References, or the bank that is there already.
        dtype: bfloat16 or float32. codec: a quantize.Codec; the records are then its codes.
        ValueError where `path` holds something else, or a reference is longer than ref_len."""
        path, c, longest = Path(path), model.config, int(np.diff(references.offsets).max())
        need(dtype in ("bfloat16", "float32"), f"dtype {dtype}: a bank is in bfloat16 or float32")
        fits = longest <= c.ref_len and references.n_vocab <= c.vocab_size
        has = f"{references.path}: {longest} tokens, vocabulary of {references.n_vocab}"
        need(fits, f"{has}; the model takes ref_len {c.ref_len} and {c.vocab_size}")
        if not (path / "meta.json").exists():
            ours = {*files(0), "meta.json.tmp", "codec.faiss", "codec.npz", "codec.new"}
            free = not path.exists() or path.is_dir() and {f.name for f in path.iterdir()} <= ours
            need(free, f"{path} holds something else than a bank: give another path")
            path.mkdir(parents=True, exist_ok=True)
            if codec:
                codec.save(path)
            vector = codec.bytes if codec else c.head_dim * getattr(torch, dtype).itemsize
            record_bytes = math.prod(c.memory_shape[:-1]) * vector
            for file, size in files(record_bytes).items():
                with open(path / file, "wb") as f:
                    f.truncate(len(references) * size)  # sparse: takes no room until written
            meta = dict(
                format=FORMAT, shape=c.memory_shape, dtype=dtype, codec=codec_name(codec),
                record_bytes=record_bytes, n=len(references), references=str(references.path),
                references_hash=[references.hash], fingerprint=model.fingerprint(),
                tokenizer=corpus.manifest(Path(references.path).parent).get("tokenizer_id"),
            )  # fmt: skip
            corpus.write_json(path / "meta.json", meta)  # the last: without it there is no bank
        bank = MemoryBank.open(path, model, references)
        has, wanted = bank.meta["codec"] or bank.meta["dtype"], codec_name(codec) or dtype
        need(has == wanted, f"{path} is a bank of {has}, not of {wanted}: give another")
        return bank

    @staticmethod
    def open(path, model=None, references=None, cache=1024):
        """The bank at `path`. model: its writer, None: read-only. references: those it was made of,
        None: from their file. cache: memories that are kept in RAM.
        FileNotFoundError or ValueError, one line with the cure, for what must not be read."""
        path, anew = Path(path), "remove the bank and run write.py again"
        file, cure = path / "meta.json", f"first python write.py --out {path}"
        need(file.exists(), f"{file} is missing: {cure}", FileNotFoundError)
        try:
            meta = json.loads(file.read_text())
            known = meta["format"] == FORMAT
        except (ValueError, KeyError, TypeError):
            known = False
        line = f"{file} is not of a memory bank of version {FORMAT[1]}: give another path"
        need(known, f"{line}, or remove an older bank")
        references = references or corpus.References.open(meta["references"])
        now, then, writer = references.hash, meta["references_hash"], meta["fingerprint"]
        line = f"{references.path} is not the text that {path} was written from"
        need(now in then, f"{line}: bring that back, or {anew}")
        reader = model.fingerprint() if model else writer
        line = f"{path} is of model {writer}: {reader} cannot read those memories (Remark A.1)"
        need(reader == writer, f"{line}; {anew}")
        for name, row in files(meta["record_bytes"]).items():
            whole = (path / name).exists() and (path / name).stat().st_size >= len(references) * row
            need(whole, f"{path / name} is missing or cut off: copy it again, or {anew}")
        codec = Codec.load(path) if meta["codec"] else None
        need(codec_name(codec) == meta["codec"], f"{path} is not of its codec.npz: {anew}")
        bank = MemoryBank(path, meta, references, model, codec, cache)
        if model and then != [now]:  # a live change was cut short: before it or after it, now known
            bank._save(n=len(bank), references_hash=[now])
        return bank

    def _save(self, **changes):
        self.meta |= changes
        corpus.write_json(self.path / "meta.json", self.meta)

    def recall(self, ids, decode=True):
        """The memories of references `ids` (1-D, any order, repeats allowed), as a pool.
        Row m is that of ids[m], on the model's device, in the dtype of the bank (float32 from
        codes; with decode=False the codes). What the cache in RAM (sec. 3.1) lacks is read, once.
        ValueError for ids that are deleted or out of range or, without a model, missing."""
        ids = torch.as_tensor(ids).cpu().numpy()
        row = ids.ndim == 1 and (not ids.size or ids.dtype.kind in "iu")
        need(row, f"recall takes a row of integers, not {ids.dtype} of {ids.shape}")
        ids, order = np.unique(ids.astype(np.int64), return_inverse=True)
        self._check(*ids[:1], *ids[-1:])
        for i in ids[self._deleted(ids)]:
            raise ValueError(f"{self.path}: {i} was deleted; take it out of the index, too")
        buffer, new = self._buffer(len(ids)), []
        rows = buffer.numpy()
        for j, i in enumerate(ids.tolist()):
            if i in self.cache:
                rows[j] = self.cache[i] = self.cache.pop(i)
            else:
                new.append(j)
        self.hits, self.misses = self.hits + len(ids) - len(new), self.misses + len(new)
        while not (good := self._read(ids[new], [rows[j] for j in new])).all():
            bad = ids[new][~good]
            self._need_model(f"the memory of reference {bad[0]} is missing or damaged")
            if not self.encoded:
                print(f"{self.path}: cold start, memories are encoded at their first retrieval")
            self.encoded += len(bad)
            self._fill(bad)
        for j in new if self.cache_size else []:
            self.cache[int(ids[j])] = rows[j].copy()
            if len(self.cache) > self.cache_size:
                del self.cache[next(iter(self.cache))]  # the least recently used
        kv = buffer.to(self.device, non_blocking=True).view(-1, *self.shape[:-1], self.vector)
        if not self.codec:
            kv = kv.view(self.dtype)  # (n, Lm, 2, Hkv, S, dh)
        elif decode:  # only the codes crossed the bus
            kv = self.codec.decode(kv)
        pool = Memories(kv, torch.from_numpy(self.count[ids].astype(np.int64)).to(self.device))
        same = np.array_equal(order, np.arange(len(ids)))  # as asked for: no copy
        return pool if same else pool[torch.from_numpy(order).to(self.device)]

    def _buffer(self, n):
        """Room for n records, used again each time: new pages take longer to get than to read full.
        On CUDA it is pinned, so that the GPU copies by itself; PyTorch gives it out again later."""
        if self.device.type == "cuda":
            return torch.empty((n, self.record_bytes), dtype=torch.uint8, pin_memory=True)
        if n > len(self.room) or sys.getrefcount(self.room) > 2:  # a pool is still made of it
            self.room = np.empty((n, self.record_bytes), np.uint8)
        return torch.from_numpy(self.room[:n])

    def _read(self, ids, rows):
        """Records -> rows (n, record_bytes) uint8, and good (n,): whose checksum fits. It is found
        while the record is in the processor's cache. (A memmap would wait fault by fault.)"""
        count, crc, good = self.count[ids], self.crc[ids], np.zeros(len(ids), bool)

        def read(share):
            for j in share:
                if crc[j]:  # else nothing was written
                    os.preadv(self.file.fileno(), [rows[j]], int(ids[j]) * self.record_bytes)
                    good[j] = checksum(rows[j], count[j]) == crc[j]

        list(self.threads.map(read, np.array_split(np.arange(len(ids)), THREADS)))  # list: raises
        return good & (crc == self.crc[ids])  # nor did another process begin to change it

    def _deleted(self, ids):
        return (self.count[ids] == DELETED) & (self.crc[ids] == 0)

    def _check(self, *ids):
        for i in ids:
            need(0 <= i < len(self), f"{self.path} has references 0 to {len(self) - 1}, and no {i}")

    def live(self):
        """The ids that are not deleted (n,)."""
        return np.flatnonzero(~self._deleted(slice(None)))

    def _windows(self):
        live = self.live()
        return np.split(live, range(self.window, len(live), self.window))

    def verify(self):
        """The ids whose record is missing or damaged. Reads the whole bank; changes nothing."""
        rows = np.empty((self.window, self.record_bytes), np.uint8)
        bad = [ids[~self._read(ids, rows)] for ids in self._windows()]
        return np.concatenate(bad).tolist()

    def stats(self):
        """One line about the cache."""
        counts = f"{self.hits:,} hits, {self.misses:,} misses, {self.encoded:,} of them encoded at"
        return f"cache of {self.cache_size:,} memories: {counts} their first retrieval"

    def write(self, batch=64, progress=True):
        """Warm start: writes every memory that is missing or damaged, and returns how many there
        were. Stopped at any moment and called again, it goes on where it was."""
        self._need_model()
        todo, n = self.verify(), len(self.live())
        with tqdm(total=n, initial=n - len(todo), unit=" memories", disable=not progress) as bar:
            self._fill(np.array(todo, int), batch, bar.update)
        return len(todo)

    def _fill(self, ids, batch=64, done=lambda n: None):
        """Encodes references in batches of ONE length, the longest first: beside padding, sums come
        in another order, and rounding decides which of two equal words is kept. So a reference
        gives the same bytes in any batch (measured on a CPU); else a quarter differ."""
        length = self.references.offsets[ids + 1] - self.references.offsets[ids]
        for n in np.unique(length)[::-1]:
            same = ids[length == n]
            for part in np.split(same, range(batch, len(same), batch)):
                with torch.inference_mode():
                    made = self.model.write(self.references.batch(part))
                    kv = made.kv.to("cpu", self.dtype)
                self._put(part, self.codec.encode(kv) if self.codec else kv, made.count)
                done(len(part))

    def _put(self, ids, kv, count):
        """Records of `ids`: first the bytes, then the count, then what vouches for them."""
        rows = kv.contiguous().view(torch.uint8).view(len(ids), -1).numpy()  # (n, record_bytes)
        for i, row, n in zip(ids.tolist(), rows, count.tolist(), strict=True):
            size = os.pwrite(self.file.fileno(), row, i * self.record_bytes)
            need(size == len(row), f"{self.path}/memories.bin: the disk is full", OSError)
            self.count[i] = n
            self.crc[i] = checksum(row, n)

    def _need_model(self, why="it is open for reading only"):
        need(self.model, f"{self.path}: {why}; open it with its model")

    def append(self, tokens):
        """Adds a reference (1 to ref_len token ids, without header) and its memory; its id."""
        return self.replace(len(self), tokens)

    def replace(self, i, tokens):
        """Gives reference i another text and, with it, memory (i = N: a new one; deleted: revived).
        While the text changes, meta.json names it as it was and as it will be, and no checksum
        vouches for row i: a kill leaves one of the two texts, its memory missing or right."""
        self._need_model()
        if i != len(self):
            self._check(i)
        most, v = self.model.config.ref_len, self.references.n_vocab
        tokens = np.atleast_1d(tokens).tolist()
        fits = 1 <= len(tokens) <= most and all(t in range(v) for t in tokens)
        need(fits, f"a reference is 1 to {most} tokens (ref_len), each 0 to {v - 1}")
        rows = [*self.references]
        rows[i : i + 1] = [tokens]
        text = np.concatenate(rows).astype(self.references.tokens.dtype)
        after = corpus.References(None, text, np.cumsum([0, *map(len, rows)]), v).hash
        self._save(references_hash=[self.references.hash, after])
        for name, size in files(self.record_bytes).items():
            os.truncate(self.path / name, max(len(self), i + 1) * size)
        self.crc[i : i + 1] = 0  # a new row has 0 already
        self.crc.flush()
        self.references.replace(i, tokens)
        self._map()
        self.cache.pop(i, None)
        self._fill(np.array([i]))
        self._save(n=len(self), references_hash=[after])
        return i

    def delete(self, i):
        """Forgets the memory of reference i: its numbers leave the disk, recalling it is an error.
        The row stays, and the text in the references' file, so that all other ids stay as well."""
        self._need_model()
        self._check(i)
        self.crc[i] = 0  # from here on missing, from the last line on deleted
        self.cache.pop(i, None)
        os.pwrite(self.file.fileno(), bytes(self.record_bytes), i * self.record_bytes)
        self.count[i] = DELETED

    def quantize(self, path, spec=None, progress=True):
        """Writes the same memories as codes (sec. 3.3) into another directory; returns that bank.
        The codec, of `spec` (None: chosen by size), is trained on vectors uniform over the filled
        slots of references drawn uniformly (App. B): 65,536, or 640,000 for the paper's own."""
        path, new, another = Path(path), Path(f"{path}.new"), "give another directory"
        need(not self.codec, f"{self.path} is quantized already: {another}")
        need(not path.exists(), f"{path} exists: {another}")
        self._need_model()  # recall makes what is missing
        rng = np.random.default_rng(0)
        some = self.recall(rng.permutation(self.live())[: 4 * self.window])
        filled = torch.arange(self.shape[3], device=self.device) < some.count[:, None]
        vectors = some.kv.transpose(1, 4)[filled].flatten(0, -2)  # (slots * 2 * Hkv * Lm, dh)
        sample = 65_536 if self.shape[4] < 64 else 640_000  # see quantize.default_spec
        codec = Codec.train(vectors[rng.permutation(len(vectors))[:sample]], spec)
        shutil.rmtree(new, ignore_errors=True)  # what a kill left of an earlier try
        bank = MemoryBank.create(new, self.model, self.references, self.meta["dtype"], codec)
        bank.count[:] = DELETED  # those that get no codes stay so
        for ids in tqdm(self._windows(), "quantizing", disable=not progress):
            pool = self.recall(ids)
            bank._put(ids, codec.encode(pool.kv), pool.count)
        os.rename(new, path)
        return MemoryBank.open(path, self.model, self.references)

def files(record_bytes):  # that have a row a reference, and the bytes of a row
    return {"memories.bin": record_bytes, "count.bin": 1, "crc.bin": 4}

COLUMNS = 1021  # a prime: pages that change places fall into other columns
POWERS = np.cumprod(np.full(2 * COLUMNS, 0x9E3779B97F4A7C15, np.uint64))  # odd: none vanishes

def checksum(record, count):
    """32 bits that vouch for a record (bytes,) uint8 and its count; never 0. Its 64-bit words are
    added up in columns, and these and what is left over are weighed by powers of one number, modulo
    2^64. Like a CRC-32 it misses one damage in 2^32, but it takes less time than to read."""
    words = record.view(f"<u{math.gcd(len(record), 8)}")
    whole = len(words) // COLUMNS * COLUMNS
    columns = np.add.reduce(words[:whole].reshape(-1, COLUMNS), 0, np.uint64)
    terms = np.concatenate([np.array([count], np.uint64), columns, words[whole:]])
    total = int(terms @ POWERS[: len(terms)])
    return max(1, (total ^ total >> 32) & 0xFFFFFFFF)

def codec_name(codec):
    return codec and f"{codec.spec}:{zlib.crc32(codec.table.cpu().numpy()):08x}"
