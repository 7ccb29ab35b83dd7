"""Logits of Hugging Face's Llama, so that invariant 1 is tested where transformers is missing, too.

    pip install transformers
    python tests/llama_reference.py      writes tests/llama_reference.json

No random numbers are in it, whose generators change: every weight is a sine of its place.
"""

import json
import math
from pathlib import Path

import torch

FILE = Path(__file__).with_suffix(".json")
SHAPE = dict(n_layer=3, n_head=6, n_kv_head=2, head_dim=10, mlp_width=34, vocab_size=97)
TOKENS = [[5, 96, 0, 41, 7, 7, 63, 12, 88, 30, 2], [1, 50, 33, 33, 90, 17, 4, 71, 20, 9, 66]]


def sines(shape, seed):
    """A float32 tensor of this shape; sines of square roots repeat no pattern."""
    n = math.prod(shape)
    place = torch.arange(1, n + 1, dtype=torch.float64)
    x = torch.sin(100 * (place + 1000 * seed).sqrt())
    return x.reshape(shape).float()


def weights(tied):
    """{name: tensor}, named as in transformers: matrices of sines, norms around 1."""
    width = SHAPE["n_head"] * SHAPE["head_dim"]
    kv_width = SHAPE["n_kv_head"] * SHAPE["head_dim"]
    mlp_width = SHAPE["mlp_width"]
    shapes = {"model.embed_tokens": (SHAPE["vocab_size"], width), "model.norm": (width,)}
    if not tied:
        shapes["lm_head"] = (SHAPE["vocab_size"], width)
    for layer in range(SHAPE["n_layer"]):
        block = f"model.layers.{layer}"
        shapes[f"{block}.self_attn.q_proj"] = (width, width)
        shapes[f"{block}.self_attn.k_proj"] = (kv_width, width)
        shapes[f"{block}.self_attn.v_proj"] = (kv_width, width)
        shapes[f"{block}.self_attn.o_proj"] = (width, width)
        shapes[f"{block}.mlp.gate_proj"] = (mlp_width, width)
        shapes[f"{block}.mlp.up_proj"] = (mlp_width, width)
        shapes[f"{block}.mlp.down_proj"] = (width, mlp_width)
        shapes[f"{block}.input_layernorm"] = (width,)
        shapes[f"{block}.post_attention_layernorm"] = (width,)
    result = {}
    for seed, (name, shape) in enumerate(sorted(shapes.items())):
        x = sines(shape, seed)
        if len(shape) == 1:
            result[f"{name}.weight"] = 1 + x / 3
        else:
            result[f"{name}.weight"] = x / 4
    return result


def main():
    from transformers import LlamaConfig, LlamaForCausalLM

    logits = {}
    for tied in (False, True):
        config = LlamaConfig(
            vocab_size=SHAPE["vocab_size"],
            hidden_size=SHAPE["n_head"] * SHAPE["head_dim"],
            intermediate_size=SHAPE["mlp_width"],
            num_hidden_layers=SHAPE["n_layer"],
            num_attention_heads=SHAPE["n_head"],
            num_key_value_heads=SHAPE["n_kv_head"],
            head_dim=SHAPE["head_dim"],
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
        )
        llama = LlamaForCausalLM(config).float().eval()
        missing, unknown = llama.load_state_dict(weights(tied), strict=False)
        assert not unknown and set(missing) <= {"lm_head.weight"}
        with torch.no_grad():
            out = llama(torch.tensor(TOKENS)).logits  # (2, 11, 97)
        some = out[:, ::2, ::5]  # (2, 6, 20)
        logits["tied" if tied else "untied"] = [round(x, 5) for x in some.flatten().tolist()]
    FILE.write_text(json.dumps(logits) + "\n")


if __name__ == "__main__":
    main()
