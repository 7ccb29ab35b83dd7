"""Invariant 1, without transformers: our logits beside those that Hugging Face's Llama gave."""

import json

import llama_reference
import pytest
import torch

from model import Config, Memory3


def ours_of(theirs):
    """Llama's weights by the names of model.py."""
    result = {}
    for name, weight in theirs.items():
        if name == "lm_head.weight":
            result["head.weight"] = weight
    result["embed.weight"] = theirs["model.embed_tokens.weight"]
    result["norm.weight"] = theirs["model.norm.weight"]
    result.setdefault("head.weight", result["embed.weight"])
    for layer in range(llama_reference.SHAPE["n_layer"]):
        block = f"model.layers.{layer}"
        qkv = [theirs[f"{block}.self_attn.{x}_proj.weight"] for x in "qkv"]
        gate_up = [theirs[f"{block}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        result[f"blocks.{layer}.attn.qkv.weight"] = torch.cat(qkv)
        result[f"blocks.{layer}.attn.out.weight"] = theirs[f"{block}.self_attn.o_proj.weight"]
        result[f"blocks.{layer}.mlp.gate_up.weight"] = torch.cat(gate_up)
        result[f"blocks.{layer}.mlp.down.weight"] = theirs[f"{block}.mlp.down_proj.weight"]
        result[f"blocks.{layer}.norm1.weight"] = theirs[f"{block}.input_layernorm.weight"]
        result[f"blocks.{layer}.norm2.weight"] = theirs[f"{block}.post_attention_layernorm.weight"]
    return result


@pytest.mark.parametrize("tied", [False, True])
def test_plain_model_equals_the_kept_logits_of_llama(tied):
    """Catches any drift from an ordinary decoder on a machine without transformers."""
    config = Config(**llama_reference.SHAPE, n_memory_layer=2, max_context=30, tied=tied)
    model = Memory3(config)
    model.load_state_dict(ours_of(llama_reference.weights(tied)))
    with torch.no_grad():
        logits, _ = model(torch.tensor(llama_reference.TOKENS))
    kept = json.loads(llama_reference.FILE.read_text())["tied" if tied else "untied"]
    theirs = torch.tensor(kept).view(2, 6, 20)
    assert theirs.std() > 0.3  # logits that say something
    torch.testing.assert_close(logits[:, ::2, ::5], theirs, rtol=1e-4, atol=1e-4)
