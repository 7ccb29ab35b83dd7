"""The decoder of Memory3: a Llama-like Transformer that writes and reads explicit memory (sec. 3).

Legend, used in every file:
    B batch              T context tokens      C chunk_len 64        R n_recall 5
    S memory_tokens 8    P header tokens       M memories in the pool        N references
    L n_layer            Lm n_memory_layer     H n_head              Hkv n_kv_head
    dh head_dim          d = H*dh              W mlp_width           V vocab_size
    c chunks, ceil(T/C)  G = H/Hkv query heads that share a key-value head
    n tokens, of a reference or of whatever else a function is given

One sequence, two formats:
    plain            context at positions 0..T-1: exactly an ordinary decoder
    with memories    header at 0..P-1 | (references were encoded at P..P+ref_len-1) | context from
                     P+ref_len on: all memories share one interval of positions ("parallel")
A memory is a subset of the keys and values that this same network computes when it reads
header + reference. It adds no parameters: any decoder of this kind can learn to use memories.
"""

import functools
import hashlib
import json
import math
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import UserError, check, check_fields, checksum, command, replace_file, write_json
from memory import (
    Memories,
    causal_attention,
    chunk_attention,
    decode_attention,
    fill_slots,
    filled_slots,
    keep_tokens,
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

    # Annotated[type, lowest value, highest value]; the comments are the help of the flags
    n_layer: Annotated[int, 1, 1000] = 44  # L
    n_memory_layer: Annotated[int, 1, 1000] = 22  # Lm: so many layers write and read memories ...
    memory_from: Annotated[int, 0, 1000] = 0  # ... and this is the first of them (sec. 3.3)
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
    # what other families of models have (convert.py)
    width: Annotated[int, 0, 2**20] = 0  # d, where it is not H*dh (Qwen3); 0 = H*dh
    qkv_bias: bool = False  # the projections q, k, v add a bias (Qwen2)
    qk_norm: bool = False  # RMSNorm of each head's q and k, before RoPE (Qwen3)
    rope_factor: Annotated[float, 1, 1e6] = 1.0  # divides RoPE's low frequencies (Llama 3)
    rope_low: Annotated[float, 1e-6, 1e6] = 1.0  # low: fewer turns in rope_original tokens
    rope_high: Annotated[float, 1e-6, 1e6] = 4.0  # not low: more turns in rope_original tokens
    rope_original: Annotated[float, 1, 1e9] = 8192.0  # tokens of its first context (Llama 3)
    tied: bool = False  # input and output embeddings share weights; not in the paper
    approximate_weights: bool = False  # sec. 3.3: exp without the normalisation
    memory_heads: str = "all"  # all, or layer.head of each that keeps memories: 2.0,2.1,3.7
    selection: Annotated[int, 1, 2**16] = 1  # number of the rule in memory.keep_tokens

    def __post_init__(self):
        self.header = tuple(int(t) for t in self.header)
        check_fields(self)
        layers = f"n_memory_layer {self.n_memory_layer}"
        line = f"{layers} > n_layer {self.n_layer}"
        check(self.n_memory_layer <= self.n_layer, line)
        line = f"memory_from {self.memory_from} + {layers} is more than n_layer {self.n_layer}"
        check(self.memory_layers.stop <= self.n_layer, line)
        line = f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}"
        check(self.n_head % self.n_kv_head == 0, line)
        line = f"rope_low {self.rope_low} is not below rope_high {self.rope_high}"
        check(self.rope_low < self.rope_high, line)
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd; RoPE turns pairs")
        if self.memory_heads != "all":
            self.memory_heads = self._sorted_heads()
        check(len(self.header) > 0, "header is empty; it must have at least the BOS")
        line = f"header {self.header}: its ids must lie below vocab_size {self.vocab_size}"
        check(0 <= min(self.header) and max(self.header) < self.vocab_size, line)

    def _sorted_heads(self):
        """memory_heads checked, each once and in order: the same heads are the same text."""
        pairs = set()
        for name in self.memory_heads.split(","):
            layer, _, head = name.strip().partition(".")
            check(
                layer.isdecimal() and head.isdecimal(),
                f"memory_heads {self.memory_heads}: {name!r} is no layer.head, such as 2.0",
            )
            layer = int(layer)
            head = int(head)
            check(
                layer in self.memory_layers and head < self.n_kv_head,
                f"memory_heads {layer}.{head}: layers {self.memory_layers[0]} to "
                f"{self.memory_layers[-1]} keep memories, with heads 0 to {self.n_kv_head - 1}",
            )
            pairs.add((layer, head))
        if len(pairs) == self.n_memory_layer * self.n_kv_head:
            return "all"
        return ",".join(f"{layer}.{head}" for layer, head in sorted(pairs))

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
        return self.width or self.n_head * self.head_dim

    @property
    def memory_layers(self):
        """The layers that write and read memories, a range: memory_layers[i] is kv[:, i]."""
        return range(self.memory_from, self.memory_from + self.n_memory_layer)

    @property
    def memory_shape(self):
        """(Lm, 2, Hkv, S, dh) = (22, 2, 8, 8, 80) for the paper's model (sec. 3.1)."""
        return self.n_memory_layer, 2, self.n_kv_head, self.memory_tokens, self.head_dim

    @property
    def kept_heads(self):
        """The heads that keep memories, if not all: pairs (index of a memory layer, kv head).

        >>> Config(n_memory_layer=4, memory_from=20, memory_heads="21.7,20.3").kept_heads
        [(0, 3), (1, 7)]
        """
        if self.memory_heads == "all":
            return None
        pairs = [name.split(".") for name in self.memory_heads.split(",")]
        return [(int(layer) - self.memory_from, int(head)) for layer, head in pairs]

    @property
    def record_shape(self):
        """What of memory_shape is stored: all of it, or (K, 2, S, dh) for K kept heads."""
        if self.kept_heads is None:
            return self.memory_shape
        return len(self.kept_heads), 2, self.memory_tokens, self.head_dim

    @property
    def n_params(self):
        """Non-embedding weights, norms aside: the "2.4B" of the paper is 2,433,024,000.

        A layer has W_Q and W_O (2 d H dh: 2 d^2), W_K and W_V (2 d dh Hkv), and the gated MLP
        (3 d W).
        """
        d = self.n_embd
        attention = 2 * d * self.head_dim * (self.n_head + self.n_kv_head)
        layer = attention + 3 * d * self.mlp_width
        return self.n_layer * layer


# -- Layers -----------------------------------------------------------------------------------


def rope_table(positions, config):
    """cos and sin (n, dh) at the given positions (n,). float32, whatever the weights are."""
    half = config.head_dim // 2
    freq = config.rope_base ** (-torch.arange(half, device=positions.device) / half)  # (dh/2,)
    if config.rope_factor > 1:
        freq = stretch(freq, config)
    angle = positions.float()[:, None] * freq  # (n, dh/2)
    angle = torch.cat([angle, angle], -1)  # (n, dh)
    return angle.cos(), angle.sin()


def stretch(freq, config):
    """Llama 3's scaling of RoPE, for contexts longer than it was first trained on. freq (dh/2,).

    Angles that turn less than rope_low times within the original context turn rope_factor times
    slower, those above rope_high as before, and those between by a share of both.
    """
    cfg = config
    turns = cfg.rope_original * freq / (2 * math.pi)  # (dh/2,)
    slow_to_fast = (turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low)  # (dh/2,)
    share = slow_to_fast.clamp(0, 1)  # of the old angle
    return share * freq + (1 - share) * freq / cfg.rope_factor


def apply_rope(x, cos, sin):
    """Turns the pairs (x_i, x_{i + dh/2}) of x (..., n, dh) by their position's angles (n, dh)."""
    a, b = x.chunk(2, -1)  # (..., n, dh/2) twice
    turned = torch.cat([-b, a], -1)  # (..., n, dh)
    y = torch.addcmul(x * cos, turned, sin)  # x * cos + turned * sin, in float32
    return y.to(x.dtype)


class Attention(nn.Module):
    """The projections of an attention layer. Which keys are attended is decided by its callers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = (config.n_head + 2 * config.n_kv_head) * config.head_dim
        self.qkv = nn.Linear(config.n_embd, width, bias=config.qkv_bias)  # W_Q, W_K, W_V in one
        self.out = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=False)  # W_O
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x, cos=None, sin=None):
        """x (B, n, d) -> q (B, H, n, dh), k v (B, Hkv, n, dh); without cos and sin, before RoPE."""
        cfg = self.config
        x = self.qkv(x)  # (B, n, (H + 2 Hkv) * dh)
        x = x.unflatten(-1, (-1, cfg.head_dim)).transpose(1, 2)  # (B, H + 2 Hkv, n, dh)
        qk, v = x.split([cfg.n_head + cfg.n_kv_head, cfg.n_kv_head], dim=1)
        if cfg.qk_norm:
            q, k = qk.split([cfg.n_head, cfg.n_kv_head], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], 1)
            qk = qk.to(v.dtype)  # under autocast a norm returns float32
        if cos is not None:
            qk = apply_rope(qk, cos, sin)
        q, k = qk.split([cfg.n_head, cfg.n_kv_head], dim=1)
        return q, k, v

    def merge(self, y):
        """The outputs of all heads y (B, H, n, dh), times W_O -> (B, n, d)."""
        y = y.transpose(1, 2).flatten(2)  # (B, n, H * dh)
        return self.out(y)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x). The paper says "gated", without the activation."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.n_embd, bias=False)

    def forward(self, x):
        """(B, n, d) -> (B, n, d)"""
        gate, up = self.gate_up(x).chunk(2, -1)  # (B, n, W) twice
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """A layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.fuse = False  # see Memory3.fuse

    def forward(self, x, attend, cos=None, sin=None):
        """x (B, n, d) -> x after this layer, and what `attend` made besides.

        attend(q, k, v) -> y, made is the attention itself; Memory3.forward and Memory3.write each
        bring their own. It gets q (B, H, n, dh) and k v (B, Hkv, n, dh), before RoPE unless cos and
        sin are given. It returns the output y (B, H, n, dh), or None if nobody needs x any more (x
        is then None as well), and `made`: the layer's part of a memory when writing, else None.
        (Results leave a layer only by being returned: recomputation and FSDP see nothing else.)
        """
        begin, finish = self.parts()
        q, k, v = begin(self, x, cos, sin)
        y, made = attend(q, k, v)
        if y is None:
            return None, made
        return finish(self, x, y), made

    def begin(self, x, cos=None, sin=None):
        """What precedes the attention: the norm and the projections, as Attention.project."""
        return self.attn.project(self.norm1(x), cos, sin)

    def finish(self, x, y):
        """What follows the attention: W_O, the residual, the MLP. y (B, H, n, dh)."""
        x = x + self.attn.merge(y)
        return x + self.mlp(self.norm2(x))

    def parts(self):
        """Block.begin and Block.finish, or the same compiled (see Memory3.fuse)."""
        return fused_parts() if self.fuse else (Block.begin, Block.finish)


@functools.cache
def fused_parts():
    """Block.begin and Block.finish, compiled once for all layers: whatever lies between two matrix
    products becomes one kernel. The cache and the attention stay outside, for the compiler would
    copy the whole cache to add one token to it."""
    begin = torch.compile(Block.begin, dynamic=False)
    finish = torch.compile(Block.finish, dynamic=False)
    return begin, finish


# -- The loss ----------------------------------------------------------------------------------

MOST_LOGITS = 2**27  # that the loss computes at a time: 512 MB in float32
# On a CPU 4 MB, which stay in its cache: the loss then takes 0.65 of the time (measured: 4,096
# tokens, V = 4,096, d = 128). With fewer rows than LEAST_ROWS at a time it would not pay.
CACHED_LOGITS = 2**20
LEAST_ROWS = 128


def cross_entropy(head, x, targets):
    """The mean cross-entropy of head(x), x (n, d), targets (n,), -1 = ignored; in float32."""
    return F.cross_entropy(head(x).float(), targets, ignore_index=-1)


class _LossInParts(torch.autograd.Function):
    """The loss and its gradients, part by part, so that only one part's logits exist at a time.

    The loss is one number, so before the backward begins its gradients are known up to one factor.
    Each part computes its own at once: no logits are kept, and none are computed twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, size):
        need_x, need_weight, _, _ = ctx.needs_input_grad
        n_targets = (targets >= 0).sum()
        loss = torch.zeros((), device=x.device)
        dx = None
        dweight = None
        if need_x:
            dx = torch.empty_like(x)  # (n, d)
        if need_weight:
            # the sum over the parts is rounded to the weights' dtype once, and not part by part
            dtype = torch.promote_types(weight.dtype, torch.float32)
            dweight = torch.zeros_like(weight, dtype=dtype)  # (V, d)
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            part = x[rows].detach().requires_grad_(need_x)  # (size, d)
            head = weight.detach().requires_grad_(need_weight)
            with torch.set_grad_enabled(need_x or need_weight):
                logits = F.linear(part, head).float()  # (size, V)
                total = F.cross_entropy(logits, targets[rows], ignore_index=-1, reduction="sum")
                part_loss = total / n_targets  # its share of the mean
            loss += part_loss.detach()
            if part_loss.requires_grad:
                part_loss.backward()
            if need_x:
                dx[rows] = part.grad
            if need_weight:
                dweight += head.grad
        if need_weight:
            dweight = dweight.to(weight.dtype)
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        if dx is not None:
            dx = dx * dloss
        if dweight is not None:
            dweight = dweight * dloss
        return dx, dweight, None, None


def rows_at_once(head, device):
    """Of how many tokens the loss computes the logits at a time."""
    rows = max(1, MOST_LOGITS // head.out_features)
    cached = CACHED_LOGITS // head.out_features
    if device.type == "cpu" and cached >= LEAST_ROWS:
        rows = min(rows, cached)
    return rows


def loss_in_parts(head, x, targets):
    """Like cross_entropy, but never with more than MOST_LOGITS logits at once."""
    rows = rows_at_once(head, x.device)
    if len(x) <= rows:
        return cross_entropy(head, x, targets)
    weight = head.weight
    if not torch.is_grad_enabled():  # which an autograd.Function is not told
        x = x.detach()
        weight = weight.detach()
    return _LossInParts.apply(x, weight, targets, rows)


# -- The decoder ------------------------------------------------------------------------------


class Memory3(nn.Module):
    """The decoder: forward reads memories, write makes them, decode adds one token at a time.

    recompute: True makes the backward of forward and write compute each layer's activations again,
    instead of keeping them. It takes the RAM of one layer instead of all, and a third more time;
    the gradients are the same, to the last bit on a CPU.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.recompute = False
        self.known_hash = None  # of the weights, as long as they do not change: see keep_hash
        self.apply(self._init)
        for name, p in self.named_parameters():  # as in GPT-2: deep residuals do not grow
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def device(self):
        return self.embed.weight.device

    def fingerprint(self):
        """Names the writer of memories: only it can read them (Remark A.1). 16 hex digits.

        It covers the weights and the config, and with it the selection (memory_tokens,
        approximate_weights) and the tokenizer's header, but no field that only reading needs.
        """
        config = asdict(self.config)
        for reader in ("n_recall", "chunk_len", "max_context"):
            del config[reader]
        config["weights"] = self.weights_hash()
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]

    def weights_hash(self):
        """The hash of the weights, in hex; that of a checkpoint is known until a weight changes.

        Not noticed: a change through .data, or by an optimizer whose gradients are gone, that
        leaves the few numbers as they are that _sample looks at. After one, call keep_hash(None).
        """
        trained = any(p.grad is not None for p in self.parameters())
        if self.known_hash is None or trained or self._sample() != self.known_at:
            return hash_weights(self.state_dict())
        return self.known_hash

    def keep_hash(self, digest):
        """digest: the hash of the weights as they are, or as they were before rounding; None: it
        is not known."""
        self.known_hash = digest
        self.known_at = None if digest is None else self._sample()

    def _sample(self):
        """What another set of weights differs in, in milliseconds: of each weight which tensor it
        is, how often it was changed in place, its dtype, and some of its numbers. Moving the model
        to another device changes none of these."""
        seen = []
        for p in self.parameters():
            numbers = p.detach().flatten()
            some = numbers[:: max(1, len(numbers) // 16)]
            seen.append((id(p), p._version, p.dtype, some.tolist()))
        return seen

    def rounded(self, dtype):
        """The model with weights in `dtype`, for generation; it keeps fingerprint and banks."""
        digest = self.weights_hash()
        self.to(dtype)
        self.keep_hash(digest)
        return self

    def fuse(self, yes=True):
        """Compiles what lies between the matrix products of a layer (torch.compile), or does not.

        The first steps then wait for the compiler; later ones start fewer kernels.
        """
        for block in self.blocks:
            block.fuse = yes

    def _header(self, batch):
        return torch.tensor(self.config.header, device=self.device).expand(batch, -1)  # (B, P)

    def _layer(self, l, x, attend, cos=None, sin=None):
        """Runs block l with its attend(l, q, k, v); with `recompute` the backward does so again."""
        block = self.blocks[l]
        args = (x, functools.partial(attend, l), cos, sin)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    def forward(
        self, tokens, targets=None, memories=None, recall=None, cache=None, return_logits=True
    ):
        """Logits of the next token, and the loss.

        tokens (B, T) int64; targets (B, T), -1 = ignored.
        memories: None = the plain decoder; a pool of Memories (even an empty one) = the format
        with header (sec. 3.2). recall (B, c, R) int64: the rows of the pool that each chunk reads,
        -1 = none; None = no chunk reads any. cache: an empty Cache, to be filled with the prompt
        (under torch.no_grad); logits then come for the last token only: (B, 1, V).
        Returns logits (B, T, V) and the mean cross-entropy (None without targets). With targets and
        return_logits=False the logits are None, and never all in RAM at once.
        """
        cfg = self.config
        B, T = tokens.shape
        line = f"{T} tokens; the context is at most max_context = {cfg.max_context}"
        check(T <= cfg.max_context, line)
        P = 0
        positions = torch.arange(T, device=tokens.device)
        if memories is not None:
            P = len(cfg.header)
            tokens = torch.cat([self._header(B), tokens], 1)  # (B, P+T)
            header = torch.arange(P, device=tokens.device)
            positions = torch.cat([header, positions + P + cfg.ref_len])  # (P+T,)
        cos, sin = rope_table(positions, cfg)  # (P+T, dh)
        reading = memories is not None and recall is not None
        if reading:
            layers = memories.kv.unbind(1)  # Lm times (M, 2, Hkv, S, dh)
            filled = filled_slots(memories.count, cfg)  # (Lm, M, Hkv)

        def attend(l, q, k, v):
            """The attention of layer l when reading, eq. (3.1); nothing is made (see Block)."""
            if cache is not None:
                cache.fill(l, k, v)
            if not reading or l not in cfg.memory_layers:
                return causal_attention(q, k, v), None
            i = l - cfg.memory_from
            mem_k, mem_v = layers[i].to(q.dtype).unbind(1)  # (M, Hkv, S, dh) twice
            count = filled[i]  # (M, Hkv)
            y = chunk_attention(q, k, v, mem_k, mem_v, count, recall, cfg.chunk_len, P)
            return y, None

        x = self.embed(tokens)  # (B, P+T, d)
        for l in range(cfg.n_layer):
            x, _ = self._layer(l, x, attend, cos, sin)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]  # (B, 1, d)
        else:
            x = x[:, P:]  # (B, T, d)
        x = self.norm(x)
        if targets is None:
            return self.head(x), None
        if not return_logits:
            return None, loss_in_parts(self.head, x.flatten(0, 1), targets.flatten())
        logits = self.head(x)  # (B, T, V)
        flat = logits.float().flatten(0, 1)  # (B*T, V)
        return logits, F.cross_entropy(flat, targets.flatten(), ignore_index=-1)

    def decode(self, tokens, cache):
        """Reads one more token of each sequence: (B,) -> logits (B, V). The cache has the rest.

        A memory layer's buffer is [header | memory slots | context]: since the memories are in it,
        eq. (3.1) is ordinary attention over one buffer.
        """
        begin, finish = self.blocks[0].parts()
        x = self.embed(tokens).unsqueeze(1)  # (B, 1, d)
        cos, sin = cache.grow()  # (1, dh)
        for l, block in enumerate(self.blocks):
            q, k, v = begin(block, x, cos, sin)  # (B, H or Hkv, 1, dh)
            y = cache.attend(l, q, k, v)  # (B, H, 1, dh)
            x = finish(block, x, y)
        x = self.norm(x[:, 0])  # (B, d)
        return self.head(x)

    def write(self, references, return_indices=False, documents=None):
        """Encodes references into explicit memories (sec. 3.2, 3.3).

        references (N, n) int64, -1 = padding at the end, 1 <= n <= ref_len.
        documents (N,) int64: whole documents (Remark 3.2). Rows that follow each other and have the
        same number are the pieces of one document, which is encoded as one sequence before its keys
        and values are cut: a piece sees those before it. A document has at most max_context +
        ref_len tokens: the model knows no positions beyond. None: each reference is encoded alone.
        Returns Memories with kv (N, Lm, 2, Hkv, S, dh), and with return_indices also which tokens
        each head kept: (N, Lm, Hkv, S), -1 = none. Differentiable through keys and values.
        """
        cfg = self.config
        references = references.to(self.device)
        mask = references >= 0  # (N, n): True where a real token is
        n = references.shape[1]
        line = f"references of {n} tokens; the model takes 1 to {cfg.ref_len}"
        check(1 <= n <= cfg.ref_len, line)
        if not torch.compiler.is_compiling():
            gap = mask[:, 1:] & ~mask[:, :-1]
            check(not gap.any(), "padding stands before a token: references are left-aligned")
        P = len(cfg.header)
        sequences = references  # (D, m): what is encoded; without documents D = N and m = n
        if documents is not None:
            sequences, row, place = join_pieces(references, documents.to(self.device))
            longest = sequences.shape[1]
            most = cfg.max_context + cfg.ref_len
            check(longest <= most, f"a document of {longest} tokens; the most at once is {most}")
        header = self._header(len(sequences))  # (D, P)
        tokens = torch.cat([header, sequences.clamp(min=0)], 1)  # (D, P+m)
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (P+m,)
        cos, sin = rope_table(positions, cfg)  # (P+m, dh)
        last = cfg.memory_layers[-1]
        if cfg.kept_heads is not None:
            # which heads would fill a slot of a memory that has one token
            one_token = torch.ones(1, dtype=torch.int64, device=self.device)
            keeps = filled_slots(one_token, cfg).unsqueeze(-1) > 0  # (Lm, 1, Hkv, 1)

        def own(x):
            """x (D, H or Hkv, P+m, dh) at each reference's own tokens: (N, H or Hkv, n, dh)."""
            if documents is None:
                return x[:, :, P:]  # all but the header: read this case first
            x = x.transpose(1, 2)  # (D, P+m, H or Hkv, dh)
            x = x[row[:, None], P + place]  # (N, n, H or Hkv, dh)
            return x.transpose(1, 2)

        def attend(l, q, k, v):
            """The attention of layer l when writing. It makes the layer's part of the memory,
            (N, 2, Hkv, S, dh), and which tokens that keeps, (N, Hkv, S)."""
            made = None
            if l in cfg.memory_layers:
                own_q = own(q)  # (N, H, n, dh): before RoPE, without the header
                own_k = own(k)  # (N, Hkv, n, dh)
                size = cfg.memory_tokens
                approximate = cfg.approximate_weights
                with torch.no_grad():  # the choice has no gradient; what was chosen does
                    index = keep_tokens(own_q, own_k, mask, size, approximate, cfg.selection)
                    if cfg.kept_heads is not None:
                        index = index.masked_fill(~keeps[l - cfg.memory_from], -1)
            q = apply_rope(q, cos, sin)
            k = apply_rope(k, cos, sin)
            if l in cfg.memory_layers:
                if documents is None:
                    turned_k = own(k)  # (N, Hkv, n, dh): after RoPE, as it is kept
                else:
                    # wherever a piece stands in its document, in memory it lies at P, P+1, ...
                    turned_k = apply_rope(own_k, cos[P : P + n], sin[P : P + n])
                memory = torch.stack([kept(turned_k, index), kept(own(v), index)], 1)
                made = (memory, index)  # (N, 2, Hkv, S, dh), (N, Hkv, S)
            if l == last:
                return None, made  # references are dropped here: only their keys were needed
            # padding is on the right, so the causal mask already hides it from real tokens
            return causal_attention(q, k, v), made

        x = self.embed(tokens)  # (D, P+m, d)
        parts = []  # of the memory, one for each memory layer
        indices = []
        for l in range(last + 1):
            # without cos and sin: q and k come before RoPE, to choose by
            x, made = self._layer(l, x, attend)
            if made is not None:
                parts.append(made[0])
                indices.append(made[1])
        kv = torch.stack(parts, 1)  # (N, Lm, 2, Hkv, S, dh)
        count = mask.sum(1).clamp(max=cfg.memory_tokens)  # (N,)
        memories = Memories(kv, count)
        if not return_indices:
            return memories
        return memories, torch.stack(indices, 1)  # (N, Lm, Hkv, S)


def kept(x, index):
    """The keys, or values, of the kept tokens; zero in slots that stay empty.

    x (N, Hkv, n, dh), index (N, Hkv, S), -1 = none -> (N, Hkv, S, dh).
    """
    at = index.clamp(min=0).unsqueeze(-1)  # (N, Hkv, S, 1)
    at = at.expand(-1, -1, -1, x.shape[-1])  # (N, Hkv, S, dh)
    filled = (index >= 0).unsqueeze(-1)  # (N, Hkv, S, 1)
    return x.gather(2, at) * filled


def join_pieces(references, documents):
    """Documents from their pieces (Remark 3.2): references (N, n), documents (N,) as in write.

    -> the tokens of D documents (D, m), m >= n, -1 = padding at the end; the row (N,) of each
    piece; and the place in that row of each of its tokens (N, n), 0 for padding. UserError if the
    pieces of a document do not follow each other.

    >>> pieces = torch.tensor([[5, 6, -1], [7, 8, 9], [4, -1, -1]])
    >>> tokens, row, place = join_pieces(pieces, torch.tensor([3, 3, 8]))
    >>> tokens.tolist(), row.tolist()
    ([[5, 6, 7, 8, 9], [4, -1, -1, -1, -1]], [0, 0, 1])
    >>> place.tolist()
    [[0, 1, 0], [2, 3, 4], [0, 0, 0]]
    """
    numbers, row = documents.unique_consecutive(return_inverse=True)  # (D,), (N,)
    each_once = len(numbers.unique()) == len(numbers)
    check(each_once, "documents: the pieces of each must follow each other")
    n = references.shape[1]
    is_token = references >= 0  # (N, n)
    length = is_token.sum(1)  # (N,), of each piece
    total = torch.zeros_like(numbers).index_add(0, row, length)  # (D,), of each document
    begin = length.cumsum(0) - length  # (N,): where a piece would begin if all were one document
    document_begin = total.cumsum(0) - total  # (D,): where its document would begin
    begin = begin - document_begin[row]  # (N,): where it begins in its document
    place = begin[:, None] + torch.arange(n, device=begin.device)  # (N, n)
    longest = max(n, int(total.max()))
    tokens = references.new_full((len(numbers), longest), -1)  # (D, m)
    rows = row[:, None].expand(-1, n)  # (N, n)
    tokens[rows[is_token], place[is_token]] = references[is_token]
    return tokens, row, place.masked_fill(~is_token, 0)


class Cache:
    """The keys and values of B sequences while they are generated, preallocated.

    Layer l holds (2, B, Hkv, P + slots + max_context, dh), in the order [header | memory slots |
    context]; only memory layers have slots, R*S of them. header=False: the plain format, without
    header and slots. length (1,): how many context tokens it holds. length is a tensor on the
    device, all changes are in place, and shapes never change: a CUDA graph of `decode` needs that.
    end, memory_end (1,): how many keys `attend` finds in a layer without memories, and in one with
    them; `grow` sets both.
    """

    def __init__(self, config, batch, max_context, header=True, dtype=torch.float32, device="cpu"):
        cfg = config
        self.config = config
        self.n_header = len(cfg.header) if header else 0
        self.n_slots = cfg.n_recall * cfg.memory_tokens if header else 0

        def buffers(n_layers, n_keys):
            shape = (n_layers, 2, batch, cfg.n_kv_head, n_keys, cfg.head_dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        # the memory layers in one tensor: their slots are all filled at once
        self.memory_kv = buffers(cfg.n_memory_layer, self.n_header + self.n_slots + max_context)
        plain_kv = buffers(cfg.n_layer - cfg.n_memory_layer, self.n_header + max_context)
        before = cfg.memory_from  # how many plain layers come before the memory layers
        self.kv = [*plain_kv[:before], *self.memory_kv, *plain_kv[before:]]

        # which slots are to be read; layers without slots have none to read
        shape = (cfg.n_memory_layer, batch, cfg.n_kv_head, self.n_slots)
        self.valid = torch.zeros(shape, dtype=bool, device=device)
        self.no_slots = self.valid[0, :, :, :0]
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        start = self.n_header + cfg.ref_len if header else 0  # the position of the first token
        self.rope = rope_table(torch.arange(start, start + max_context, device=device), cfg)

    def clear(self):
        """Empties the cache: no context, no memories."""
        self.length.zero_()
        self.valid.zero_()

    def fill(self, l, k, v):
        """The prefill of layer l: k v (B, Hkv, P+T, dh)."""
        P = self.n_header
        start = P + self.n_slots if l in self.config.memory_layers else P
        end = start + k.shape[2] - P
        keys, values = self.kv[l]
        for buffer, x in ((keys, k), (values, v)):
            buffer[:, :, :P] = x[:, :, :P]
            buffer[:, :, start:end] = x[:, :, P:]

    def grow(self):
        """Makes room for one more token; returns cos and sin (1, dh) of its position."""
        cos, sin = self.rope
        cos = cos[self.length]
        sin = sin[self.length]
        self.length += 1
        self.end = self.n_header + self.length
        self.memory_end = self.end + self.n_slots
        return cos, sin

    def attend(self, l, q, k, v):
        """Adds the new token's k v (B, Hkv, 1, dh) to layer l, then attends all keys in it.

        q (B, H, 1, dh) -> (B, H, 1, dh). `grow` has made room for the token.
        """
        end = self.end
        valid = self.no_slots
        if l in self.config.memory_layers:
            end = self.memory_end
            valid = self.valid[l - self.config.memory_from]  # (B, Hkv, R*S)
        q = q.squeeze(2)  # (B, H, dh)
        k = k.squeeze(2)  # (B, Hkv, dh)
        v = v.squeeze(2)  # (B, Hkv, dh)
        keys, values = self.kv[l]  # (B, Hkv, n_keys, dh) twice
        y = decode_attention(q, k, v, keys, values, valid, end, self.n_header)  # (B, H, dh)
        return y.unsqueeze(2)  # (B, H, 1, dh)

    def load_memories(self, memories, table, codec=None):
        """Overwrites the memory slots in place: sequence b now reads memories table[b].

        table (B, R): rows of the pool, -1 = none. codec: if given, memories.kv are its codes.
        """
        self.valid.zero_()
        if len(memories) == 0:
            return  # nothing was found
        count = filled_slots(memories.count, self.config)  # (Lm, M, Hkv)
        count = count[:, table.clamp(min=0)]  # (Lm, B, R, Hkv)
        count = count.masked_fill(table.unsqueeze(-1) < 0, 0)
        slot = torch.arange(self.config.memory_tokens, device=table.device)  # (S,)
        filled = slot < count.unsqueeze(-1)  # (Lm, B, R, Hkv, S)
        filled = filled.transpose(2, 3).flatten(3)  # (Lm, B, Hkv, R*S)
        self.valid[..., : filled.shape[-1]] = filled
        fill_slots(self.memory_kv, memories, table, self.n_header, codec)


# -- Checkpoints ------------------------------------------------------------------------------
#
# A checkpoint is one file, which may be copied and renamed. It is what torch.save writes of
# dict(model=weights by name, meta=dict, optimizer=dict or nothing), followed by a checksum of all
# those bytes. meta["weights"] is the hash of the weights: the model's identity (see fingerprint).

CHECKSUM = "crc32 "  # a checkpoint ends with this and eight hex digits: 14 bytes


def hash_weights(weights):
    """sha256, in hex, of a state dict: the names, dtypes, shapes and bytes of its tensors."""

    def hash_tensor(name):
        tensor = weights[name].detach().cpu().contiguous()
        digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
        return digest.digest()

    with ThreadPoolExecutor() as pool:  # hashlib releases Python's lock while it works
        digests = pool.map(hash_tensor, sorted(weights))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def check_finite(weights, file):
    """UserError if a number of a state dict is nan or infinite."""
    for name, tensor in weights.items():
        low, high = torch.aminmax(tensor.detach())  # both are nan if any number is
        finite = math.isfinite(low) and math.isfinite(high)
        check(finite, f"{file}: weight {name} holds nan or infinite numbers; nothing is done")


class SummedFile:
    """A file for torch.save that keeps the CRC-32 of what passes through it."""

    def __init__(self, file):
        self.file = file
        self.crc = 0

    def write(self, data):
        self.crc = zlib.crc32(data, self.crc)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def save_checkpoint(path, weights, meta, optimizer=None, shards=None):
    """Writes a checkpoint beside its place and renames it: a kill leaves the old one.

    weights: a state dict; UserError unless all of it is finite. meta: a dict with at least config,
    the Config as a dict. optimizer: its state, so that the run can be resumed. Beside a model.pt
    the same meta is written as meta.json, for people to read. shards: where the tensors are if
    not in this file (parallel.py), which then has no weights.
    """
    path = Path(path)
    check_finite(weights, path)
    meta = dict(meta, weights=hash_weights(weights))
    state = dict(model=weights, meta=meta)
    if optimizer is not None:
        state["optimizer"] = optimizer
    if shards is not None:
        state["shards"] = shards

    copy = path.with_name("meta.json")

    def write(file):
        summed = SummedFile(file)
        torch.save(state, summed)
        file.write(f"{CHECKSUM}{summed.crc:08x}".encode())
        if path.name == "model.pt":  # which is whole, and has only to be renamed
            copy.unlink(missing_ok=True)  # so that it is never that of other weights

    replace_file(path, write)
    if path.name == "model.pt":
        write_json(copy, meta)


def checksum_fault(file):
    """What is wrong with the checksum at the end of a checkpoint, or None. Reads all of it."""
    size = max(0, file.stat().st_size - len(CHECKSUM) - 8)
    with open(file, "rb") as f:
        f.seek(size)
        end = f.read().decode(errors="replace")
    if not end.startswith(CHECKSUM):
        return "no checksum at its end: it is cut off, or older than checksums (--no_verify)"
    written = f"{CHECKSUM}{checksum(file, size):08x}"
    return None if end == written else "its bytes have changed"


def read_checkpoint(path, verify=True):
    """-> dict(model, meta, and optimizer if there is one) of a checkpoint, and the file's path.

    path: a .pt file, or a directory that holds model.pt. The tensors are mapped from the file and
    read when they are used: copy them. verify: check the checksum first, one pass over the file.
    UserError for anything but a whole checkpoint.
    """
    path = Path(path)
    file = path / "model.pt" if path.is_dir() else path
    check(file.is_file(), f"{file}: no checkpoint there; python train.py makes one")
    fault = checksum_fault(file) if verify else None
    if not fault:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            state["model"].items()
            state["meta"]["config"].items()
            return state, file
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            fault = str(error).split("\n")[0]
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            fault = str(error).split("\n")[0]
    cure = "take another copy of it, or train again"
    raise UserError(f"{file}: not a checkpoint as train.py wrote it ({fault}); {cure}")


@torch.inference_mode(False)  # weights that were made there could not be trained, nor compared
def load_checkpoint(path, verify=True):
    """-> the model, on the CPU and in the file's dtype, and meta (config, stage, step, tokenizer id
    ...). path: a .pt file of train.py, or a directory that holds model.pt.

    verify=False saves a pass over the file, for its checksum, and a shorter one over the weights.
    Measured on one core of an AMD EPYC, the file in RAM, 2.0 GB/s: 3 s for a 2.4b in bfloat16 (5.6
    GB), 6 s in float32 (11.3 GB). Yours: python -m timeit -s "from common import checksum; from
    pathlib import Path" "checksum(Path('FILE'))"
    """
    state, file = read_checkpoint(path, verify)
    meta = state["meta"]
    if "shards" in state:
        resume = ["--resume", file.parent, "--steps", meta["step"]]
        cure = f"{command('train.py', *resume)} makes a model.pt of it"
        raise UserError(f"{file}: its weights lie beside it, in parts; {cure}")
    try:
        config = Config.from_dict(meta["config"])
        with torch.device("meta"):  # no memory is taken before the file's weights
            model = Memory3(config)
        if "optimizer" in state:  # most of the file is not needed
            weights = {name: tensor.clone() for name, tensor in state["model"].items()}
        else:  # all of it is: read at once, and in memory once
            weights = torch.load(file, map_location="cpu", weights_only=True)["model"]
        model.load_state_dict(weights, assign=True)
    except (UserError, AttributeError, TypeError, RuntimeError) as error:
        fault = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: its config and its weights do not fit ({fault})") from None
    if config.tied:
        model.head.weight = model.embed.weight
    if verify:
        check_finite(weights, file)
        beside = file.with_name("meta.json")
        if file.name == "model.pt" and beside.exists():
            there = str(meta.get("weights")) in beside.read_text(errors="replace")
            check(there, f"{beside} is not that of {file}: take both from the same run")
    model.keep_hash(meta.get("weights"))
    model.path = str(path)  # for the commands that refusals give
    return model, meta
