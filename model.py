"""The decoder of Memory3: a Llama-like Transformer that writes and reads explicit memory (sec. 3).

Legend, used in every file:
    B batch              T context tokens      C chunk_len 64        R n_recall 5
    S memory_tokens 8    P header tokens       M memories in the pool        N references
    L n_layer            Lm n_memory_layer     H n_head              Hkv n_kv_head
    dh head_dim          d = H*dh              W mlp_width           V vocab_size

One sequence, two formats:
    plain            context at positions 0..T-1: exactly an ordinary decoder
    with memories    header at 0..P-1 | (references were encoded at P..P+ref_len-1) | context from
                     P+ref_len on: all memories share one interval of positions ("parallel")
A memory is a subset of the keys and values that this same network computes when it reads
header + reference. It adds no parameters: any decoder of this kind can learn to use memories.
"""

import hashlib
import json
import math
import pickle
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, check, check_fields
from memory import (
    Memories,
    causal_attention,
    choose_tokens,
    chunk_attention,
    decode_attention,
    fill_slots,
)

# -- Shapes -----------------------------------------------------------------------------------

PRESETS = dict(
    toy=dict(
        n_layer=6, n_memory_layer=4, n_head=4, n_kv_head=4, head_dim=32, mlp_width=384,
        memory_tokens=16, chunk_len=32, ref_len=64, max_context=512, vocab_size=4096, tied=True,
    ),
    small=dict(n_layer=12, n_memory_layer=6, n_head=12, n_kv_head=4, head_dim=64, mlp_width=768),
    # Fig. 3.3; the paper gives L, H, dh and "0.92B", which W = d and Hkv = 8 meet
    **{"0.9b": dict(n_layer=40, n_memory_layer=20, n_head=32, n_kv_head=8, head_dim=64,
                    mlp_width=2048)},
    # sec. 3.4 and App. A
    **{"2.4b": dict(n_layer=44, n_memory_layer=22, n_head=40, n_kv_head=8, head_dim=80,
                    mlp_width=3200)},
)  # fmt: skip


@dataclass
class Config:
    """The shape of a model and of its memories. The defaults are the paper's (sec. 3.3, 3.4)."""

    # each with its lowest and highest value, or type alone
    n_layer: Annotated[int, 1, 1000] = 44  # L
    n_memory_layer: Annotated[int, 1, 1000] = 22  # Lm: the first Lm layers write and read memories
    n_head: Annotated[int, 1, 1024] = 40  # H
    n_kv_head: Annotated[int, 1, 1024] = 8  # Hkv
    head_dim: Annotated[int, 2, 1024] = 80  # dh
    mlp_width: Annotated[int, 1, 2**20] = 3200  # W
    vocab_size: Annotated[int, 1, 2**24] = 60416  # V
    max_context: Annotated[int, 1, 2**24] = 2048  # longest T, in tokens
    chunk_len: Annotated[int, 1, 2**16] = 64  # C, in tokens
    n_recall: Annotated[int, 1, 1000] = 5  # R, memories a chunk reads
    memory_tokens: Annotated[int, 1, 254] = 8  # S, tokens of a reference that each head keeps
    ref_len: Annotated[int, 1, 2**16] = 128  # longest reference, in tokens
    header: tuple = (1, 2, 3)  # token ids of "<s>Reference:"; header[0] is the BOS
    rope_base: Annotated[float, 1, 1e12] = 10000.0  # not in the paper
    norm_eps: Annotated[float, 0, 1] = 1e-5  # RMSNorm; not in the paper
    tied: bool = False  # input and output embeddings share weights; not in the paper
    approximate_weights: bool = False  # sec. 3.3: exp without the normalisation

    def __post_init__(self):
        self.header = tuple(int(t) for t in self.header)
        check_fields(self)
        layers = f"n_memory_layer {self.n_memory_layer} > n_layer {self.n_layer}"
        check(self.n_memory_layer <= self.n_layer, f"{layers}: memories live in the first layers")
        heads = f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}"
        check(self.n_head % self.n_kv_head == 0, heads)
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd; RoPE turns pairs")
        check(self.header, "header is empty; it is at least the BOS")
        inside = min(self.header) >= 0 and max(self.header) < self.vocab_size
        check(inside, f"header {self.header}: its ids are below vocab_size {self.vocab_size}")

    @staticmethod
    def preset(name, **changes):
        check(name in PRESETS, f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return Config(**{**PRESETS[name], **changes})

    @staticmethod
    def from_dict(d):
        known = {f.name for f in fields(Config)}
        unknown = sorted(set(d) - known)
        check(not unknown, f"unknown config names {unknown}; known are {sorted(known)}")
        return Config(**d)

    @property
    def n_embd(self):  # d
        return self.n_head * self.head_dim

    @property
    def memory_shape(self):
        """(Lm, 2, Hkv, S, dh) = (22, 2, 8, 8, 80) for the paper's model (sec. 3.1)."""
        return self.n_memory_layer, 2, self.n_kv_head, self.memory_tokens, self.head_dim

    @property
    def n_params(self):
        """Non-embedding weights, norms aside: the "2.4B" of the paper is 2,433,024,000.

        A layer has W_Q and W_O (2 d^2), W_K and W_V (2 d dh Hkv), and the gated MLP (3 d W).
        """
        d = self.n_embd
        layer = 2 * d * d + 2 * d * self.head_dim * self.n_kv_head + 3 * d * self.mlp_width
        return self.n_layer * layer


# -- Layers -----------------------------------------------------------------------------------


def rope_table(positions, config):
    """cos and sin (n, dh) at the given positions (n,). float32, whatever the weights are."""
    half = config.head_dim // 2
    freq = config.rope_base ** (-torch.arange(half, device=positions.device) / half)
    angle = positions.float()[:, None] * freq  # (n, dh/2)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Turns the pairs (x_i, x_{i + dh/2}) of x (..., n, dh) by their position's angles."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        H, Hkv, dh, d = config.n_head, config.n_kv_head, config.head_dim, config.n_embd
        self.qkv = nn.Linear(d, (H + 2 * Hkv) * dh, bias=False)  # W_Q, W_K, W_V in one product
        self.out = nn.Linear(H * dh, d, bias=False)  # W_O

    def project(self, x, cos=None, sin=None):
        """x (B, n, d) -> q (B, H, n, dh), k v (B, Hkv, n, dh); without cos and sin, before RoPE."""
        c = self.config
        x = self.qkv(x).view(*x.shape[:2], c.n_head + 2 * c.n_kv_head, c.head_dim).transpose(1, 2)
        qk, v = x.split([c.n_head + c.n_kv_head, c.n_kv_head], dim=1)
        qk = qk if cos is None else apply_rope(qk, cos, sin)
        return *qk.split([c.n_head, c.n_kv_head], dim=1), v

    def merge(self, y):  # (B, H, n, dh) -> (B, n, d)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x). The paper says "gated", without the activation."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def finish(self, x, y):
        """What follows the attention: W_O, the residual, the MLP. y (B, H, n, dh)."""
        x = x + self.attn.merge(y)
        return x + self.mlp(self.norm2(x))


# -- The decoder ------------------------------------------------------------------------------


class Memory3(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.origin = None  # the fingerprint, where these weights are rounded from others
        self.apply(self._init)
        for name, p in self.named_parameters():  # GPT-2's: keep the residual's size over depth
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, 0.02)

    @property
    def device(self):
        return self.embed.weight.device

    def fingerprint(self):
        """A hash of the writer: whose memories these are (Remark A.1). 16 hex digits.

        It covers the weights and the config, and so the selection (memory_tokens, approximate_
        weights) and the tokenizer's header, but not what only the reader needs.
        """
        if self.origin:
            return self.origin
        config = asdict(self.config)
        for reader in ("n_recall", "chunk_len", "max_context"):
            del config[reader]
        h = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, p in sorted(self.state_dict().items()):
            h.update(name.encode())
            h.update(p.detach().cpu().float().numpy().tobytes())
        return h.hexdigest()[:16]

    def rounded(self, dtype):
        """The model with weights in `dtype`, to generate; keeps its fingerprint, for its banks."""
        self.origin = self.fingerprint()
        return self.to(dtype)

    def _header(self, batch):
        return torch.tensor(self.config.header, device=self.device).expand(batch, -1)  # (B, P)

    def forward(self, tokens, targets=None, memories=None, recall=None, cache=None):
        """Logits of the next token, and the loss.

        tokens (B, T) int64; targets (B, T), -1 = ignored.
        memories: None = the plain decoder; a pool of Memories (even an empty one) = the format
        with header (sec. 3.2). recall (B, ceil(T/C), R) int64: rows of the pool, -1 = none; None =
        no chunk reads any. cache: an empty Cache, which is filled (the prefill of a prompt, under
        torch.no_grad); then only the last token has logits.
        Returns logits (B, T, V) and the mean cross-entropy (None without targets).
        """
        c, (B, T) = self.config, tokens.shape
        if T > c.max_context:
            raise UserError(f"{T} tokens; the context is at most max_context = {c.max_context}")
        P, positions = 0, torch.arange(T, device=tokens.device)
        if memories is not None:
            P = len(c.header)
            tokens = torch.cat([self._header(B), tokens], 1)
            positions = torch.cat([positions.new_tensor(range(P)), positions + P + c.ref_len])
        cos, sin = rope_table(positions, c)
        x = self.embed(tokens)  # (B, P+T, d)
        readers = 0 if memories is None or recall is None else c.n_memory_layer
        for l, block in enumerate(self.blocks):
            q, k, v = block.attn.project(block.norm1(x), cos, sin)
            if cache is not None:
                cache.fill(l, k, v)
            if l < readers:
                kv = memories.kv[:, l].to(q.dtype)  # (M, 2, Hkv, S, dh)
                pool = kv[:, 0], kv[:, 1], memories.count
                y = chunk_attention(q, k, v, *pool, recall, c.chunk_len, P)
            else:
                y = causal_attention(q, k, v)
            x = block.finish(x, y)
        if cache is not None:
            cache.length += T
        logits = self.head(self.norm(x[:, P if cache is None else -1 :]))
        if targets is None:
            return logits, None
        flat = logits.float().reshape(-1, logits.shape[-1])
        return logits, F.cross_entropy(flat, targets.reshape(-1), ignore_index=-1)

    def decode(self, tokens, cache):
        """One more token a sequence: tokens (B,) -> logits (B, V). The cache holds all before it.

        A memory layer's buffer is [header | memory slots | context]: with the memories in place,
        eq. (3.1) is ordinary attention over one buffer.
        """
        x, (cos, sin) = self.embed(tokens).unsqueeze(1), cache.grow()  # (B, 1, d); (1, dh) twice
        for l, block in enumerate(self.blocks):
            q, k, v = block.attn.project(block.norm1(x), cos, sin)
            y = decode_attention(q[:, :, 0], *cache.append(l, k, v), cache.P)  # (B, H, dh)
            x = block.finish(x, y.unsqueeze(2))
        return self.head(self.norm(x[:, 0]))

    def write(self, references, return_indices=False):
        """Encodes references into explicit memories (sec. 3.2, 3.3).

        references (N, n) int64, -1 = padding at the end, 1 <= n <= ref_len.
        Returns Memories with kv (N, Lm, 2, Hkv, S, dh), and with return_indices also which tokens
        each head kept: (N, Lm, Hkv, S), -1 = none. Differentiable through keys and values.
        """
        c = self.config
        references = references.to(self.device)
        mask = references >= 0  # (N, n)
        N, n = references.shape
        if not 1 <= n <= c.ref_len:
            raise UserError(f"references of {n} tokens; the model takes 1 to ref_len {c.ref_len}")
        if not torch.compiler.is_compiling() and (mask[:, 1:] & ~mask[:, :-1]).any():
            raise UserError("padding stands before a token: references are left-aligned")
        P, S = len(c.header), c.memory_tokens
        tokens = torch.cat([self._header(N), references.clamp(min=0)], 1)
        cos, sin = rope_table(torch.arange(P + n, device=tokens.device), c)
        x = self.embed(tokens)
        kept, chosen = [], []
        for l in range(c.n_memory_layer):
            block = self.blocks[l]
            q, k, v = block.attn.project(block.norm1(x))
            with torch.no_grad():  # which tokens is not differentiable, what they say is
                index = choose_tokens(q[:, :, P:], k[:, :, P:], mask, S, c.approximate_weights)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
            at = (index.clamp(min=0) + P).unsqueeze(-1).expand(-1, -1, -1, c.head_dim)
            full = (index >= 0).unsqueeze(-1)  # empty slots hold zeros
            kept.append(torch.stack([k.gather(2, at) * full, v.gather(2, at) * full], 1))
            chosen.append(index)  # (N, Hkv, S)
            if l + 1 < c.n_memory_layer:  # after the last keys and values nothing is needed
                # padding is on the right, so the causal mask already hides it from real tokens
                x = block.finish(x, causal_attention(q, k, v))
        memories = Memories(torch.stack(kept, 1), mask.sum(1).clamp(max=S))
        return (memories, torch.stack(chosen, 1)) if return_indices else memories


class Cache:
    """Keys and values of B sequences while they are generated, preallocated.

    Layer l holds (2, B, Hkv, P + slots + max_context, dh), in the order [header | memory slots |
    context]; only memory layers have slots, R*S of them. header=False: the plain format, without
    header and slots. length (1,): context tokens in it so far; on the device, as all is done in
    place, in shapes that never change: what a CUDA graph of `decode` needs.
    """

    def __init__(self, config, batch, max_context, header=True, dtype=torch.float32, device="cpu"):
        c = self.config = config
        self.P, self.slots = (len(c.header), c.n_recall * c.memory_tokens) if header else (0, 0)

        def layers(n, keys):
            shape = (n, 2, batch, c.n_kv_head, keys, c.head_dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        # the memory layers in one tensor: a recall fills the slots of all at once
        self.memory_kv = layers(c.n_memory_layer, self.P + self.slots + max_context)
        others = layers(c.n_layer - c.n_memory_layer, self.P + max_context)
        self.kv = [*self.memory_kv, *others]
        self.valid = torch.zeros(batch, self.slots, dtype=bool, device=device)  # slots to be read
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        start = self.P + c.ref_len if header else 0
        self.rope = rope_table(torch.arange(start, start + max_context, device=device), c)

    def clear(self):
        self.length.zero_()
        self.valid.zero_()

    def fill(self, l, k, v):  # k v (B, Hkv, P+T, dh): the prefill
        at, T = self.P + self.slots * (l < self.config.n_memory_layer), k.shape[2] - self.P
        for mine, x in zip(self.kv[l], (k, v), strict=True):
            mine[:, :, : self.P] = x[:, :, : self.P]
            mine[:, :, at : at + T] = x[:, :, self.P :]

    def grow(self):
        """Room for one more token; cos and sin (1, dh) of its position."""
        # in memory layers and in others: where its key comes to lie, how many there are then
        self.at = [self.P + self.slots + self.length, self.P + self.length]
        self.ends = [at + 1 for at in self.at]
        cos_sin = [x[self.length] for x in self.rope]
        self.length += 1
        return cos_sin

    def append(self, l, k, v):
        """Adds the new token's k v (B, Hkv, 1, dh) -> what decode_attention attends."""
        other = l >= self.config.n_memory_layer
        for mine, x in zip(self.kv[l], (k, v), strict=True):
            mine.index_copy_(2, self.at[other], x)
        return *self.kv[l], self.valid[:, :0] if other else self.valid, self.ends[other]

    def recall(self, memories, table, codec=None):
        """Overwrites the memory slots in place: sequence b now reads memories table[b].

        table (B, R) rows of the pool, -1 = none. codec: the pool's kv are its codes.
        """
        self.valid.zero_()
        if len(memories) == 0:
            return  # nothing was found
        count = torch.where(table >= 0, memories.count[table.clamp(min=0)], 0)  # (B, R)
        filled = torch.arange(self.config.memory_tokens, device=table.device) < count.unsqueeze(-1)
        self.valid[:, : filled[0].numel()] = filled.flatten(1)  # (B, R*S)
        fill_slots(self.memory_kv, memories, table, self.P, codec)


# -- Checkpoints ------------------------------------------------------------------------------


def load_checkpoint(path, with_optimizer=False):
    """-> model (on the CPU), meta (config, stage, step, tokenizer id ...) and, if asked for, the
    optimizer's state. path: a .pt file of train.py, or a directory that holds model.pt."""
    path = Path(path)
    file = path / "model.pt" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{file}: no checkpoint there; python train.py makes one")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        meta = state["meta"]
        model = Memory3(Config.from_dict(meta["config"]))
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as e:
        why = str(e).split("\n")[0]
        raise UserError(f"{file}: not a checkpoint of train.py, or cut off ({why})") from None
    return (model, meta, state["optimizer"]) if with_optimizer else (model, meta)
