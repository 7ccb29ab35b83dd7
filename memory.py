"""The explicit memory: which tokens it keeps, how it is read, and the bank that holds it on disk.

    writing    token_weights -> select_tokens -> Memories          sec. 3.3
    reading    chunk_attention: memories, header and causal context in one softmax      eq. 3.1
    storing    MemoryBank: fixed-size records, checksums, a cache in RAM               sec. 3.1, 3.3

Shapes are named as in the legend at the top of model.py. Nothing here has weights of its own: an
explicit memory is made of the decoder's attention keys and values and read by its own attention.
"""

import json
import math
import os
import shutil
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import corpus
from quantize import Codec

aten = torch.ops.aten

# -- What a memory is -------------------------------------------------------------------------

@dataclass
class Memories:
    """A pool of M explicit memories.

    kv (M, Lm, 2, Hkv, S, dh): keys (after RoPE) and values of the kept tokens, layer by layer.
    count (M,) int64: how many of the S slots are filled (short references fill fewer).
    """

    kv: torch.Tensor
    count: torch.Tensor

    def __len__(self):
        return self.kv.shape[0]

    def __getitem__(self, rows):
        return Memories(self.kv[rows], self.count[rows])

    def to(self, *args, **kwargs):
        device = torch.empty(0).to(*args, **kwargs).device
        return Memories(self.kv.to(*args, **kwargs), self.count.to(device))

    @staticmethod
    def empty(config, dtype=torch.float32, device="cpu"):
        """A pool with nothing in it: header and context are read, no memory is (Table C.1)."""
        kv = torch.zeros((0, *config.memory_shape), dtype=dtype, device=device)
        return Memories(kv, torch.zeros(0, dtype=torch.int64, device=device))

    @staticmethod
    def cat(pools):
        return Memories(torch.cat([p.kv for p in pools]), torch.cat([p.count for p in pools]))

# -- Writing: which tokens of a reference are worth keeping -----------------------------------

def token_weights(q, k, mask, approximate=False):
    """How much attention each token of a reference receives from all of it (sec. 3.3).

        w_j = sum_i softmax_j(q_i . k_j / sqrt(dh))         i, j over the reference's own tokens

    summed over the query heads that share a key-value head (the paper leaves this open).
    q (N, H, n, dh), k (N, Hkv, n, dh): before RoPE, since a token must have the same chance to be
    kept wherever it stands; for the same reason there is no causal mask.
    mask (N, n) bool: True where a real token is. Header and padding are neither i nor j.
    approximate: the sum of exp(q_i . k_j / sqrt(dh)) without the softmax's division, as the paper
    ran it. Rows and columns are then shifted by one constant per key-value head, which keeps the
    order of the weights and keeps exp from overflowing.
    Returns (N, Hkv, n) float32, zero at masked tokens. Softmax and sums are in float32: sums in
    bfloat16 would change a fifth of the choices.

    With q = 0 every token gets the same share, 1/3 from each of 3 tokens:
    >>> token_weights(torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 4, 2), torch.arange(4)[None] < 3)
    tensor([[[1., 1., 1., 0.]]])
    """
    N, H, n, dh = q.shape
    Hkv = k.shape[1]
    q = q.float().view(N, Hkv, H // Hkv, n, dh)
    scores = q @ k.float().unsqueeze(2).mT / math.sqrt(dh)  # (N, Hkv, H/Hkv, n, n)
    real = mask[:, None, None, None, :]  # over j
    scores = scores.masked_fill(~real, float("-inf"))
    if approximate:
        scores = scores.masked_fill(~mask[:, None, None, :, None], float("-inf"))  # over i
        peak = scores.amax((2, 3, 4), keepdim=True)
        a = (scores - peak.clamp(min=torch.finfo(torch.float32).min)).exp()
    else:
        a = scores.softmax(-1).nan_to_num()  # a reference of padding alone has no weights
    a = a * mask[:, None, None, :, None]  # padding asks for nothing
    return a.sum((2, 3))  # over the query heads of the group and over i

def select_tokens(weights, mask, s):
    """The s tokens of largest weight for each reference and key-value head, in ascending order.

    weights (N, Hkv, n), mask (N, n). Ties go to the lower index. Returns indices (N, Hkv, s) int64,
    -1 at the end where a reference has fewer than s tokens (it then keeps them all).

    >>> w = torch.tensor([[[.1, .5, .2, .5, .9]]])
    >>> select_tokens(w, torch.tensor([[True, True, True, True, False]]), 3)
    tensor([[[1, 2, 3]]])
    """
    n = weights.shape[-1]
    if n < s:  # fewer columns than slots: pad, so that there is something to sort
        weights, mask = F.pad(weights, (0, s - n)), F.pad(mask, (0, s - n))
    n = weights.shape[-1]
    weights = weights.masked_fill(~mask[:, None, :], float("-inf"))
    top = weights.sort(dim=-1, descending=True, stable=True).indices[..., :s]
    real = mask[:, None, :].expand_as(weights).gather(-1, top)
    top = top.masked_fill(~real, n).sort(-1).values  # padding to the end
    return top.masked_fill(top == n, -1)

# -- Reading: chunk attention ------------------------------------------------------------------
#
# Every context token attends [memories of its chunk | header + causal context] in one softmax. A
# mask over the concatenation would be (T, M*S + T) a head, nearly all of it False, and no fused
# kernel takes it. But a softmax over two sets of keys is two softmaxes over one set each,
# weighed by how much each set had to say:
#
#     lse = log(exp(lse_1) + exp(lse_2))        out = exp(lse_1-lse) out_1 + exp(lse_2-lse) out_2
#
# so the causal part goes to PyTorch's fused attention and the memory part, C queries by R*S keys,
# is a small batched product. The backward needs no new mathematics either: the gradient of a
# softmax is p * (dp - sum(out * dout)) with p = exp(score - lse), and given the MERGED out and lse
# each part's own backward computes exactly its share. (Autograd cannot do this by itself: the
# fused op gives lse no gradient.)

def attention_path(device, dtype, n):
    """Which code computes causal attention over n tokens, and why: every entry point prints it."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return "flash", f"CUDA, {dtype}"
    if device.type == "cuda":
        return "math", f"flash attention does not take {dtype}"
    if device.type == "cpu" and n > 512:
        return "cpu-flash", "PyTorch's fused attention for CPUs"
    # In bfloat16 on a CPU with AMX the plain product is 5 times as fast as the fused op at n = 128,
    # twice at 256, even at 512 (4 heads of 32). In float32: as fast at 40, half as fast at 256.
    return "math", f"{device.type}, {n} tokens: few enough for the plain product"

def _causal(q, k, v, path):
    """Causal attention. q (B, H, n, dh), k v (B, Hkv, n, dh) -> out, lse (B, H, n), and what the
    backward of this path wants besides."""
    if path == "cpu-flash":
        return *aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True), ()
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    if path == "flash":
        out, lse, *saved, _ = aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)
        return out, lse, saved  # lengths and the state of a dropout that there is not
    n = q.shape[2]
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~torch.ones(n, n, dtype=bool, device=q.device).tril(), -math.inf)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse, ()

def _causal_backward(dout, q, k, v, out, lse, path, saved):
    """The causal part's share of dq, and dk, dv, given the merged out and lse."""
    if path == "cpu-flash":
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(dout, q, k, v, out, lse, 0.0, True)
    Hkv = k.shape[1]
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    if path == "flash":
        *lengths, seed, offset = saved
        backward = aten._scaled_dot_product_flash_attention_backward
        dq, dk, dv = backward(dout, q, k, v, out, lse, *lengths, 0.0, True, seed, offset)
    else:
        scale = 1 / math.sqrt(q.shape[-1])
        p = (q @ k.mT * scale - lse.unsqueeze(-1)).exp().tril().to(q.dtype)
        ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
        dq, dk, dv = ds @ k, ds.mT @ q, p.mT @ dout
    return dq, _sum_groups(dk, Hkv), _sum_groups(dv, Hkv)

def causal_attention(q, k, v):
    """The attention of a plain decoder. q (B, H, n, dh), k v (B, Hkv, n, dh) -> (B, H, n, dh)."""
    if attention_path(q.device, q.dtype, q.shape[2])[0] != "math":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    n = q.shape[2]
    future = torch.full((n, n), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = (q / math.sqrt(q.shape[-1])) @ _repeat(k, q.shape[1]).mT + future
    return scores.softmax(-1) @ _repeat(v, q.shape[1])

def _repeat(x, H):  # (B, Hkv, ...) -> (B, H, ...): query head h reads key-value head h // (H/Hkv)
    return x if x.shape[1] == H else x.repeat_interleave(H // x.shape[1], dim=1)

def _sum_groups(x, Hkv):  # the gradient of _repeat
    return x if x.shape[1] == Hkv else x.unflatten(1, (Hkv, -1)).sum(2)

class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mem_k, mem_v, valid, recall, chunk_len, n_header, path):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse, saved = _causal(q, k, v, path)
        # The memory part, all chunks at once. Its queries are the context's, padded to full chunks.
        qm = _chunks(q[:, :, n_header:], mem_k.shape[1], chunk_len)  # (B, Hkv, c, G*C, dh)
        km, vm = _gather(mem_k, recall), _gather(mem_v, recall)  # (B, Hkv, c, R*S, dh)
        scores = (qm @ km.mT).to(lse.dtype) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~valid, -math.inf)  # (B, Hkv, c, G*C, R*S)
        lse_m = scores.logsumexp(-1)  # -inf where a chunk has no memory at all
        p = (scores - lse_m.masked_fill(lse_m == -math.inf, 0).unsqueeze(-1)).exp()
        out_m = p.to(vm.dtype) @ vm
        # Merge, on the context only: the header attends no memory.
        T = q.shape[2] - n_header
        lse_m = _unchunk(lse_m.unsqueeze(-1), q.shape[1], T).squeeze(-1)
        out_m = _unchunk(out_m, q.shape[1], T)
        lse_c = lse[:, :, n_header:]
        both = torch.logaddexp(lse_c, lse_m)
        out, lse = out.contiguous(), lse.contiguous().clone()
        context = out[:, :, n_header:]
        merged = context * (lse_c - both).exp().unsqueeze(-1)
        merged += out_m * (lse_m - both).exp().unsqueeze(-1)
        context.copy_(merged)
        lse[:, :, n_header:] = both
        ctx.save_for_backward(q, k, v, mem_k, mem_v, valid, recall, out, lse)
        ctx.rest = chunk_len, n_header, path, saved
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, mem_k, mem_v, valid, recall, out, lse = ctx.saved_tensors
        chunk_len, n_header, path, saved = ctx.rest
        dout = dout.contiguous()
        dq, dk, dv = _causal_backward(dout, q, k, v, out, lse, path, saved)
        Hkv, scale = mem_k.shape[1], 1 / math.sqrt(q.shape[-1])
        qm = _chunks(q[:, :, n_header:], Hkv, chunk_len)
        om = _chunks(out[:, :, n_header:], Hkv, chunk_len)
        dm = _chunks(dout[:, :, n_header:], Hkv, chunk_len)
        lm = _chunks(lse[:, :, n_header:].unsqueeze(-1), Hkv, chunk_len)  # (B, Hkv, c, G*C, 1)
        km, vm = _gather(mem_k, recall), _gather(mem_v, recall)
        p = ((qm @ km.mT).to(lse.dtype) * scale - lm).exp().masked_fill(~valid, 0).to(q.dtype)
        ds = p * (dm @ vm.mT - (dm * om).sum(-1, keepdim=True)) * scale
        dq = dq.contiguous()
        dq[:, :, n_header:] += _unchunk(ds @ km, q.shape[1], q.shape[2] - n_header)
        dmem_k = _scatter(ds.mT @ qm, mem_k, recall)
        dmem_v = _scatter(p.mT @ dm, mem_v, recall)
        return dq, dk, dv, dmem_k, dmem_v, None, None, None, None, None

def _chunks(x, Hkv, C):
    """(B, H, T, d) -> (B, Hkv, c, G*C, d): the queries of a chunk and of a head group side by side,
    since they read the same keys. The last chunk is padded with zeros."""
    B, H, T, d = x.shape
    x = F.pad(x, (0, 0, 0, -T % C)).view(B, Hkv, H // Hkv, -1, C, d)
    return x.transpose(2, 3).flatten(3, 4)

def _unchunk(x, H, T):  # (B, Hkv, c, G*C, d) -> (B, H, T, d)
    B, Hkv, c, _, d = x.shape
    return x.view(B, Hkv, c, H // Hkv, -1, d).transpose(2, 3).reshape(B, H, -1, d)[:, :, :T]

def _gather(mem, recall):  # (M, Hkv, S, dh), (B, c, R) -> (B, Hkv, c, R*S, dh)
    return mem[recall].permute(0, 3, 1, 2, 4, 5).flatten(3, 4)

def _scatter(grad, mem, recall):
    """The gradient of _gather: a memory that several chunks recalled sums what each says."""
    B, c, R = recall.shape
    M, Hkv, S, dh = mem.shape
    grad = grad.view(B, Hkv, c, R, S, dh).permute(0, 2, 3, 1, 4, 5).reshape(-1, Hkv, S, dh)
    return torch.zeros_like(mem).index_add_(0, recall.reshape(-1), grad.to(mem.dtype))

def chunk_attention(q, k, v, mem_k, mem_v, count, recall, chunk_len, n_header, path=None):
    """Self-attention in which each chunk of the context also reads its own memories (eq. 3.1).

    q (B, H, P+T, dh), k v (B, Hkv, P+T, dh): header then context, after RoPE.
    mem_k mem_v (M, Hkv, S, dh): one layer of the pool; count (M,): filled slots of each memory.
    recall (B, c, R) int64: which memories chunk c = context tokens [cC, (c+1)C) reads, -1 = none;
    c = ceil(T / C). path: forces one of attention_path's names (tests).
    Returns (B, H, P+T, dh).

    The softmax runs over all keys of [memories | header | causal context] together; memories
    need no order and no mask among each other (parallel positions, sec. 3.2).
    """
    B, H, n, dh = q.shape
    path = path or attention_path(q.device, q.dtype, n)[0]
    c = -(-(n - n_header) // chunk_len)
    if recall is not None and recall.shape[:2] != (B, c):
        raise ValueError(
            f"recall has shape {tuple(recall.shape)}; {B} sequences of {n - n_header} tokens in "
            f"chunks of {chunk_len} need ({B}, {c}, R)"
        )
    if recall is None or recall.shape[2] == 0 or mem_k.shape[0] == 0:
        if recall is not None and mem_k.shape[0] == 0 and (recall >= 0).any():
            raise ValueError("recall names memories, but the pool is empty")
        return causal_attention(q, k, v)
    S = mem_k.shape[2]
    filled = torch.arange(S, device=q.device) < count[:, None]  # (M, S)
    index = recall.clamp(min=0)
    valid = filled[index] & (recall >= 0).unsqueeze(-1)  # (B, c, R, S)
    valid = valid.flatten(2)[:, None, :, None, :]  # (B, 1, c, 1, R*S), over heads and queries
    return _ChunkAttention.apply(q, k, v, mem_k, mem_v, valid, index, chunk_len, n_header, path)

# -- Storing: the bank ------------------------------------------------------------------------

FORMAT = ["memory3 bank", 1]  # and its version
DELETED = 255  # in count.bin
THREADS = 8
WINDOW = 64 << 20  # bytes that are read at a time where the whole bank is

class MemoryBank:
    """The memories of a whole knowledge base, on disk: row i is that of reference i (sec. 3.1).

        meta.json       shape, dtype, codec, references, and whose memories these are
        memories.bin    n records of one size, (Lm, 2, Hkv, S, dh) numbers or (Lm, 2, Hkv, S) codes
        count.bin       uint8 each: filled slots; 255 = deleted
        crc.bin         uint32 each: CRC-32 of the record, begun with the count; 0 = not written
        codec.*         where quantized (sec. 3.3)

    A record is on disk before its checksum is, so a writer may die at any moment: what it left half
    done counts as missing. With a model, `write` makes all missing records (warm start), `recall`
    those that it needs (cold start); without one the bank is read-only. Only the model that wrote
    memories can read them (Remark A.1): meta.json has its fingerprint. One process writes at once.

        bank = MemoryBank.create("out/kb.bank", model, corpus.References.open("data/cities/kb"))
        bank.write()
        logits, _ = model(tokens, None, bank.recall([17, 4, 17]), recall)   # a pool of 3
    """

    def __init__(self, path, meta, references, model, codec, cache):
        self.path, self.meta, self.references, self.model = path, meta, references, model
        self.shape, self.dtype = tuple(meta["shape"]), getattr(torch, meta["dtype"])
        self.record_bytes = meta["record_bytes"]
        self.window = max(1, WINDOW // self.record_bytes)
        self.device = model.device if model else torch.device("cpu")
        self.codec = codec and codec.to(self.device)
        self.cache, self.cache_size = OrderedDict(), cache  # id -> its record, last used last
        self.hits = self.misses = self.encoded = 0
        self.file = open(path / "memories.bin", "r+b" if model else "rb", buffering=0)
        self.pool = ThreadPoolExecutor(THREADS)  # an SSD answers many reads at a time
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
        ValueError where `path` holds something else, or a reference is longer than ref_len.
        """
        path, c, longest = Path(path), model.config, int(np.diff(references.offsets).max())
        name = codec and codec_name(codec)
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype {dtype}: a bank is in bfloat16 or float32")
        if longest > c.ref_len or references.n_vocab > c.vocab_size:
            has = f"{references.path}: {longest} tokens, vocabulary of {references.n_vocab}"
            raise ValueError(f"{has}; the model takes ref_len {c.ref_len} and {c.vocab_size}")
        if not (path / "meta.json").exists():
            ours = {*files(0), "meta.json.tmp", "codec.faiss", "codec.npz", "codec.new"}
            if path.exists() and not (path.is_dir() and {f.name for f in path.iterdir()} <= ours):
                raise ValueError(f"{path} holds something else than a bank: give another path")
            vector = codec.bytes if codec else c.head_dim * getattr(torch, dtype).itemsize
            record_bytes = math.prod(c.memory_shape[:-1]) * vector
            path.mkdir(parents=True, exist_ok=True)
            for file, size in files(record_bytes).items():
                with open(path / file, "wb") as f:
                    f.truncate(len(references) * size)  # sparse: takes no room until written
            if codec:
                codec.save(path)
            meta = dict(
                format=FORMAT, shape=c.memory_shape, dtype=dtype, codec=name, n=len(references),
                record_bytes=record_bytes, references=str(references.path),
                references_hash=[references.hash], fingerprint=model.fingerprint(),
                tokenizer=corpus.manifest(Path(references.path).parent).get("tokenizer_id"),
            )  # fmt: skip
            corpus.write_json(path / "meta.json", meta)  # the last: without it there is no bank
        bank = MemoryBank.open(path, model, references)
        if (has := bank.meta["codec"] or bank.meta["dtype"]) != (name or dtype):
            raise ValueError(f"{path} is a bank of {has}, not of {name or dtype}: give another")
        return bank

    @staticmethod
    def open(path, model=None, references=None, cache=1024):
        """The bank at `path`; cache: memories that are kept in RAM.

        model: its writer; None: read-only. references: those it was made of, None: from their file.
        One line with the cure (FileNotFoundError, ValueError) for what must not be read.
        """
        path, anew = Path(path), "remove the bank and run write.py again"
        file = path / "meta.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: first python write.py --out {path}")
        try:
            meta = json.loads(file.read_text())
            if meta["format"] != FORMAT:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            line = f"{file} is not of a memory bank of version {FORMAT[1]}"
            raise ValueError(f"{line}: give another path") from None
        references = references or corpus.References.open(meta["references"])
        now, then, writer = references.hash, meta["references_hash"], meta["fingerprint"]
        if now not in then:
            line = f"{references.path} is not the text that {path} was written from"
            raise ValueError(f"{line}: bring that back, or {anew}")
        if model and model.fingerprint() != writer:
            line = f"{path} was written by model {writer}, this model is {model.fingerprint()}"
            raise ValueError(f"{line}: it cannot read those memories (Remark A.1); {anew}")
        for name, size in files(meta["record_bytes"]).items():
            if not (path / name).exists():
                raise FileNotFoundError(f"{path / name} is missing: {anew}")
            if os.path.getsize(path / name) < len(references) * size:
                raise ValueError(f"{path / name} is cut off: copy it again, or {anew}")
        codec = Codec.load(path) if meta["codec"] else None
        if codec and codec_name(codec) != meta["codec"]:
            raise ValueError(f"{path} is not of its codec.npz: {anew}")
        bank = MemoryBank(path, meta, references, model, codec, cache)
        if model and then != [now]:  # a live change was cut short: before it or after it, now known
            bank._save(n=len(bank), references_hash=[now])
        return bank

    def _save(self, **changes):
        self.meta |= changes
        corpus.write_json(self.path / "meta.json", self.meta)

    def recall(self, ids):
        """The memories of references `ids` (1-D, any order, repeats allowed), as a pool.

        Row m of the pool is ids[m]; kv is in the dtype of the bank (float32 from codes), on the
        model's device. A record comes from the cache in RAM (sec. 3.1), else from disk, once.
        ValueError for ids that are deleted or out of range, and, without a model, for missing ones.
        """
        ids = torch.as_tensor(ids).cpu().numpy()
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"recall takes a row of integers, not {ids.dtype} of {ids.shape}")
        ids, order = np.unique(ids.astype(np.int64), return_inverse=True)
        self._check(ids)
        if len(gone := ids[self._deleted(ids)]):
            raise ValueError(f"{self.path}: {gone[0]} was deleted; take it out of the index, too")
        # One buffer, pinned where a GPU copies from it; row j is for ids[j].
        size, pin = (len(ids), self.record_bytes), self.device.type == "cuda"
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
        missed = []
        for j, i in enumerate(ids.tolist()):
            if i in self.cache:
                buffer[j] = self.cache[i]
                self.cache.move_to_end(i)
            else:
                missed.append(j)
        self.hits, self.misses = self.hits + len(ids) - len(missed), self.misses + len(missed)
        rows = [buffer[j].numpy() for j in missed]
        while not (good := self._read(ids[missed], rows)).all():
            self._cold_start(ids[missed][~good])
        for j in missed:
            self.cache[int(ids[j])] = buffer[j].clone()
            if len(self.cache) > self.cache_size:
                self.cache.popitem(last=False)  # the least recently used
        count = torch.from_numpy(self.count[ids].astype(np.int64)).to(self.device)
        rows = buffer.to(self.device, non_blocking=True)
        if self.codec:  # only the codes crossed the bus
            kv = self.codec.decode(rows.view(-1, *self.shape[:-1], self.codec.bytes))
        else:
            kv = rows.view(self.dtype).view(-1, *self.shape)  # (n, Lm, 2, Hkv, S, dh)
        return Memories(kv, count)[torch.from_numpy(order).to(self.device)]

    def _cold_start(self, ids):
        """Encodes what recall did not find, and keeps it on disk."""
        self._need_model(f"the memory of reference {ids[0]} is missing or damaged")
        if not self.encoded:
            print(f"{self.path}: cold start, memories are encoded at their first retrieval")
        self.encoded += len(ids)
        self._fill(ids)

    def _read(self, ids, rows):
        """Records of ascending ids -> rows, n uint8 arrays. Returns good (n,): the checksum fits.

        A memmap with fancy indexing would be five times slower: one page fault after another.
        """
        count, crc, good = self.count[ids], self.crc[ids], np.zeros(len(ids), bool)

        def read(share):
            for j in share:
                if crc[j]:  # else nothing was written
                    os.preadv(self.file.fileno(), [rows[j]], int(ids[j]) * self.record_bytes)
                    good[j] = checksum(rows[j], count[j]) == crc[j]

        shares = np.array_split(np.arange(len(ids)), THREADS)
        list(self.pool.map(read, shares))  # list: raises what a thread raised
        return good

    def _deleted(self, ids):
        return (self.count[ids] == DELETED) & (self.crc[ids] == 0)

    def _check(self, ids):  # ascending
        if len(ids) and not 0 <= ids[0] <= ids[-1] < len(self):
            wrong = ids[0] if ids[0] < 0 else ids[-1]
            raise ValueError(f"{self.path} has references 0 to {len(self) - 1}, and none {wrong}")

    def live(self):
        """The ids that are not deleted (n,)."""
        return np.flatnonzero(~self._deleted(slice(None)))

    def verify(self):
        """The ids whose record is missing or damaged. Reads the whole bank; changes nothing."""
        bad, live = [], self.live()
        for ids in np.split(live, range(self.window, len(live), self.window)):
            rows = np.empty((len(ids), self.record_bytes), np.uint8)
            bad += ids[~self._read(ids, rows)].tolist()
        return bad

    def stats(self):
        """One line about the cache."""
        return (
            f"cache of {self.cache_size:,} memories: {self.hits:,} hits, {self.misses:,} misses, "
            f"{self.encoded:,} of them encoded at their first retrieval"
        )

    def write(self, batch=64, progress=True):
        """Warm start: writes every memory that is missing or damaged. Returns how many there were.

        Stopped at any moment and called again, it goes on where it was.
        """
        self._need_model()
        todo, n = self.verify(), len(self.live())
        with tqdm(total=n, initial=n - len(todo), unit=" memories", disable=not progress) as bar:
            self._fill(np.array(todo, int), batch, bar.update)
        return len(todo)

    def _fill(self, ids, batch=64, done=lambda n: None):
        """Encodes references in batches of ONE length, the longest first.

        Without padding the same reference gives the same bytes in whatever batch it comes (on a
        CPU: measured). With padding, sums are added up in another order, and a quarter of the toy's
        records differ: a word that a text repeats weighs the same each time it stands there, and
        then rounding decides which of the two is kept.
        """
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
        for i, row in zip(ids.tolist(), rows, strict=True):
            if os.pwrite(self.file.fileno(), row, i * self.record_bytes) < len(row):
                raise OSError(f"{self.path}/memories.bin: the disk is full")
        self.count[ids] = count.cpu()
        self.crc[ids] = [checksum(r, c) for r, c in zip(rows, count.tolist(), strict=True)]

    def _need_model(self, why="it is open for reading only"):
        if not self.model:
            raise ValueError(f"{self.path}: {why}; open it with its model")

    def append(self, tokens):
        """Adds a reference (1 to ref_len token ids, without header) and its memory; its id."""
        return self.replace(len(self), tokens)

    def replace(self, i, tokens):
        """Gives reference i another text and, with it, memory (i = N: a new one; deleted: revived).

        While the text changes, meta.json names it as it was and as it will be, and no checksum
        vouches for row i: a kill leaves one of the two texts, its memory missing or right.
        """
        self._need_model()
        self._check([i] if i != len(self) else [])
        tokens, most, v = np.asarray(tokens), self.model.config.ref_len, self.references.n_vocab
        whole = tokens.ndim == 1 and tokens.dtype.kind in "iu" and 1 <= len(tokens) <= most
        if not whole or tokens.min() < 0 or tokens.max() >= v:
            raise ValueError(f"a reference is 1 to {most} tokens (ref_len), each 0 to {v - 1}")
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

        The row stays, and the text in the references' file, so that all other ids stay as well.
        """
        self._need_model()
        self._check([i])
        self.crc[i] = 0  # from here on missing, from the last line on deleted
        self.cache.pop(i, None)
        os.pwrite(self.file.fileno(), bytes(self.record_bytes), i * self.record_bytes)
        self.count[i] = DELETED

    def quantize(self, path, codec=None, spec=None, progress=True):
        """Writes the same memories as codes (sec. 3.3) into another directory; returns that bank.

        codec: a quantize.Codec; None: trained here, for `spec` (None: chosen by size), on vectors
        uniform over the filled slots of references drawn uniformly (App. B): 65,536, or the 640,000
        that the paper's codec wants for heads of 64 and more.
        """
        path, new, live = Path(path), Path(f"{path}.new"), self.live()
        if self.codec or path.exists():
            what = f"{self.path} is quantized already" if self.codec else f"{path} exists"
            raise ValueError(f"{what}: give another directory")
        if bad := self.verify():
            line = f"{self.path}: {len(bad):,} memories are missing or damaged"
            raise ValueError(f"{line}; first python write.py --out {self.path}")
        self._need_model()
        if not codec:
            rng = np.random.default_rng(0)
            some = self.recall(rng.permutation(live)[: 4 * self.window])
            filled = torch.arange(self.shape[3], device=self.device) < some.count[:, None]
            vectors = some.kv.transpose(1, 4)[filled].flatten(0, -2)  # (slots * 2 * Hkv * Lm, dh)
            sample = 65_536 if self.shape[4] < 64 else 640_000
            codec = Codec.train(vectors[rng.permutation(len(vectors))[:sample]], spec)
        shutil.rmtree(new, ignore_errors=True)  # what a kill left of an earlier try
        bank = MemoryBank.create(new, self.model, self.references, self.meta["dtype"], codec)
        bank.count[:] = DELETED
        windows = np.split(live, range(self.window, len(live), self.window))
        for ids in tqdm(windows, "quantizing", disable=not progress):
            pool = self.recall(ids)
            bank._put(ids, codec.encode(pool.kv), pool.count)
        os.rename(new, path)
        return MemoryBank.open(path, self.model, self.references)

def files(record_bytes):
    """The files with a row a reference, and the bytes of a row."""
    return {"memories.bin": record_bytes, "count.bin": 1, "crc.bin": 4}

def checksum(row, count):
    """The CRC-32 of a record and its count; never 0, which says "not written"."""
    return zlib.crc32(row, int(count)) or 1

def codec_name(codec):
    return f"{codec.spec}:{zlib.crc32(codec.table.cpu().numpy()):08x}"
