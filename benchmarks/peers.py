"""Others' ways to do the same, for a fair speed: a plain GPT to train, transformers to decode.

The plain GPT has the parts of GPT-2 (LayerNorm, learnt positions, GELU, all heads with their own
keys and values) in the fewest operations that PyTorch has for them. transformers is optional.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class PlainBlock(nn.Module):
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.n_head, -1))  # (B, T, 3, H, dh)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, dh) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))  # (B, T, d)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    """A GPT of the width, depth, heads, context and vocabulary of a Config."""

    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        self.embed = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_context, width)
        self.blocks = nn.ModuleList(PlainBlock(width, config.n_head) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, targets):
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]  # (B, T, d)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def step_flops(self, config, n_windows):
        """FLOPs of a training step: as cost.forward counts, two per multiply-add, causal half."""
        T = config.max_context
        width = config.n_embd
        weights = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        attention = config.n_layer * 2 * (T * T / 2) * width
        head = T * config.vocab_size * width
        return n_windows * 3 * 2 * (T * weights + attention + head)


def llama_of(config, dtype, device):
    """transformers' Llama of a Config's shape, random weights; ImportError without transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        hidden_size=config.n_embd,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_context,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device(device):
        return LlamaForCausalLM(shape).to(dtype).eval()


def decode_with_transformers(llama, tokens, n_new):
    """Greedy generation with transformers' static cache (on CUDA it compiles its step)."""
    mask = torch.ones_like(tokens)
    how = dict(do_sample=False, max_new_tokens=n_new, cache_implementation="static")
    with torch.inference_mode():
        return llama.generate(tokens, attention_mask=mask, **how)


def loss_on(model, batch, device):
    """As train.loss_on, for a PlainGPT."""
    tokens, targets, _, _ = batch
    return model(tokens.to(device), targets.to(device))
