"""Brings in a model of the Llama family, and takes one of ours out (sec. 3.2: any decoder will do).

    python convert.py SmolLM2-135M-Instruct --out out/smollm2         a Hugging Face directory
    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf --out out/smollm2         or a GGUF file
    python convert.py out/smollm2 --to_hf --out out/smollm2-hf              and back again

Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3 are one decoder with four switches: a bias of q, k
and v, a norm of q and k, Llama 3's RoPE, a width that is not H*dh. Each is a field of Config. The
weights are theirs, number by number; only their names change, and q, k, v become one matrix.

A converted model has not learnt to read memories: finetune it (train.py --stage explicit).
Left out: sliding windows, biases elsewhere, mixtures of experts, other kinds of RoPE, tokenizers
that are no byte-level BPE (Llama 2's, Mistral 7B's).
"""

import argparse
import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

import corpus
from common import UserError, check, command, make_directory, optional, read_json, run, write_json
from model import Config, Memory3, load_checkpoint, rope_table, save_checkpoint

# the families, by Hugging Face's model_type: what is not in config.json but in their code
FAMILIES = dict(
    llama=dict(qkv_bias=False, qk_norm=False),
    mistral=dict(qkv_bias=False, qk_norm=False),
    qwen2=dict(qkv_bias=True, qk_norm=False),
    qwen3=dict(qkv_bias=False, qk_norm=True),
)
# the fields of Config that their config.json tells; the others are ours
OF_WEIGHTS = """n_layer n_head n_kv_head head_dim mlp_width vocab_size header norm_eps tied width
    qkv_bias qk_norm rope_base rope_factor rope_low rope_high rope_original""".split()
# of ours, those that the command line offers
OF_MEMORIES = ("n_memory_layer", "memory_from", "memory_tokens", "n_recall", "chunk_len", "ref_len")
SHARD = 2 << 30  # bytes of a file of weights that --to_hf writes, at most

# -- Names ------------------------------------------------------------------------------------


def names(config):
    """[(our name, their names)] of all weights: ours are the rows of theirs, one below the other.

    >>> names(Config(n_layer=1, n_memory_layer=1))[2]
    ('blocks.0.attn.qkv.weight', ['model.layers.0.self_attn.q_proj.weight', \
'model.layers.0.self_attn.k_proj.weight', 'model.layers.0.self_attn.v_proj.weight'])
    """
    found = [("embed.weight", ["model.embed_tokens.weight"])]
    for l in range(config.n_layer):
        ours = f"blocks.{l}"
        theirs = f"model.layers.{l}"
        qkv = [f"{theirs}.self_attn.{x}_proj" for x in "qkv"]
        gate_up = [f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"]
        found.append((f"{ours}.norm1.weight", [f"{theirs}.input_layernorm.weight"]))
        found.append((f"{ours}.attn.qkv.weight", [f"{name}.weight" for name in qkv]))
        if config.qkv_bias:
            found.append((f"{ours}.attn.qkv.bias", [f"{name}.bias" for name in qkv]))
        if config.qk_norm:
            for x in "qk":
                its = f"{theirs}.self_attn.{x}_norm.weight"
                found.append((f"{ours}.attn.{x}_norm.weight", [its]))
        found.append((f"{ours}.attn.out.weight", [f"{theirs}.self_attn.o_proj.weight"]))
        found.append((f"{ours}.norm2.weight", [f"{theirs}.post_attention_layernorm.weight"]))
        found.append((f"{ours}.mlp.gate_up.weight", gate_up))
        found.append((f"{ours}.mlp.down.weight", [f"{theirs}.mlp.down_proj.weight"]))
    found.append(("norm.weight", ["model.norm.weight"]))
    if not config.tied:
        found.append(("head.weight", ["lm_head.weight"]))
    return found


def row_counts(config, ours):
    """How many rows each of their matrices has in one of ours; None: it is one of theirs whole."""
    if ".qkv." in ours:
        kv = config.n_kv_head * config.head_dim
        return [config.n_head * config.head_dim, kv, kv]
    if ".gate_up." in ours:
        return [config.mlp_width, config.mlp_width]
    return None


# -- Sources ----------------------------------------------------------------------------------
#
# Each has .made, a config.json as a dict; .names of its tensors, in Hugging Face's words;
# .all_bfloat16; .copy(name, to) and .tokenizer().


def copy_exactly(where, tensor, to):
    fits = tensor.shape == to.shape
    check(fits, f"{where} is {tuple(tensor.shape)}; its config makes it {tuple(to.shape)}")
    to.copy_(tensor)


class HuggingFace:
    """A directory of config.json, tokenizer.json and one or more .safetensors files.

    A file is mapped only while one tensor is copied out of it: so no page of it counts as ours for
    longer, and the peak is the converted model and one tensor.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.cure = "give a directory as Hugging Face's save_pretrained writes it"
        self.made = read_json(self.path / "config.json", dict(model_type=str), self.cure)
        self.safetensors = optional("safetensors")
        files = sorted(self.path.glob("*.safetensors"))
        index = self.path / "model.safetensors.index.json"
        self.named = {}  # tensor -> the file that has it
        if index.exists():
            self.named = read_json(index, dict(weight_map=dict), self.cure)["weight_map"]
            # any other file has the same weights in another format
            files = [file for file in files if file.name in self.named.values()]
        check(files, f"{path}: no .safetensors file in it: {self.cure}")
        self.file_of = {}
        dtypes = set()
        for file in files:
            with self.open(file) as tensors:
                for name in tensors.keys():
                    self.file_of[name] = file
                    dtypes.add(tensors.get_slice(name).get_dtype())
        self.check_shards()
        self.names = set(self.file_of)
        self.all_bfloat16 = dtypes == {"BF16"}

    def open(self, file):
        try:
            return self.safetensors.safe_open(file, "pt")
        except (self.safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or cut off ({error}): copy it again") from None

    def check_shards(self):
        """Every tensor that the index names is there: a missing file is named, not its tensors."""
        for name, file in self.named.items():
            check(name in self.file_of, f"{self.path}/{file} is missing: copy it, too")

    def copy(self, name, to):
        """Copies a tensor into another one of the same shape."""
        with self.open(self.file_of[name]) as tensors:
            copy_exactly(f"{self.path}: {name}", tensors.get_tensor(name), to)

    def tokenizer(self):
        """Theirs as ours; the BOS is that of config.json, where it names one."""
        file = self.path / "tokenizer.json"
        made = read_json(
            file, dict(added_tokens=list), "give the directory with its tokenizer.json"
        )
        bos = None
        for token in made["added_tokens"]:
            if token.get("id") == self.made.get("bos_token_id"):
                bos = token.get("content")
        return corpus.from_huggingface(file, bos)


# how a GGUF file calls the weights of a layer, and the others
GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_OTHER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# how its tokenizers cut a text: what a Hugging Face tokenizer.json says, by GGUF's name for it
BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def meant(x):
    """A number as it was before it became a float32.

    >>> meant(np.float32(1e-5))
    1e-05
    """
    return float(f"{float(x):.6g}")


def split_by(*patterns):
    steps = []
    for regex in patterns:
        pattern = dict(Regex=regex)
        steps.append(dict(type="Split", pattern=pattern, behavior="Isolated", invert=False))
    return dict(type="Sequence", pretokenizers=[*steps, BYTES | dict(use_regex=False)])


def digits_apart():
    return dict(type="Sequence", pretokenizers=[dict(type="Digits", individual_digits=True), BYTES])


GGUF_PRE = {
    "gpt-2": BYTES,
    "smollm": digits_apart(),
    "llama-bpe": split_by(LLAMA3_SPLIT),
    "qwen2": split_by(LLAMA3_SPLIT.replace("{1,3}", "")),
}
NORMAL, CONTROL = 1, 3  # kinds of tokens in a GGUF file: text, special; others are always one token


class Gguf:
    """A GGUF file, as llama.cpp has it; its blocks of few bits become float32."""

    def __init__(self, path):
        self.path = Path(path)
        self.gguf = optional("gguf")
        check(self.path.is_file(), f"{path}: no such file")
        try:
            reader = self.gguf.GGUFReader(str(path))
        except (ValueError, OSError, IndexError) as error:
            raise UserError(f"{path}: not a GGUF file, or cut off ({error})") from None
        self.fields = reader.fields
        self.arch = self.field("general.architecture")
        check(self.arch in FAMILIES, f"{path}: architecture {self.arch}, not {', '.join(FAMILIES)}")
        self.tensors = {}
        self.rope_freqs = None
        for tensor in reader.tensors:
            if tensor.name == "rope_freqs.weight":
                self.rope_freqs = torch.tensor(np.array(tensor.data))  # (dh/2,)
            else:
                self.tensors[self.their_name(tensor.name)] = tensor
        self.names = set(self.tensors)
        self.all_bfloat16 = False
        self.made = self.config()

    def field(self, name, default=None):
        if name not in self.fields:
            check(default is not None, f"{self.path}: it does not say {name}")
            return default
        try:
            return self.fields[name].contents()
        except UnicodeDecodeError:
            line = f"{self.path} is damaged: {name} is no text: copy the file again"
            raise UserError(line) from None

    def their_name(self, name):
        """ "blk.0.attn_q.weight" -> "model.layers.0.self_attn.q_proj.weight" """
        if name in GGUF_OTHER:
            return GGUF_OTHER[name]
        parts = name.split(".")
        for theirs, its in GGUF_LAYER.items():
            if len(parts) == 4 and parts[0] == "blk" and parts[2] == its:
                return f"model.layers.{parts[1]}.{theirs}.{parts[3]}"
        return name  # refused later, by this name

    def config(self):
        """What the file says of the model, as a config.json says it."""

        def of(name, default=None):
            return self.field(f"{self.arch}.{name}", default)

        check("model.embed_tokens.weight" in self.names, f"{self.path}: no token_embd.weight in it")
        embedding = self.tensors["model.embed_tokens.weight"]
        heads = of("attention.head_count")
        width = of("embedding_length")
        made = dict(
            model_type=self.arch,
            num_hidden_layers=of("block_count"),
            hidden_size=width,
            intermediate_size=of("feed_forward_length"),
            num_attention_heads=heads,
            num_key_value_heads=of("attention.head_count_kv", heads),
            head_dim=of("attention.key_length", of("rope.dimension_count", width // heads)),
            rms_norm_eps=meant(of("attention.layer_norm_rms_epsilon")),
            rope_theta=meant(of("rope.freq_base", 10000.0)),
            max_position_embeddings=of("context_length"),
            sliding_window=of("attention.sliding_window", 0),  # 0: none
            vocab_size=int(embedding.shape[-1]),  # its shapes are written backwards
            tie_word_embeddings="lm_head.weight" not in self.tensors,
            bos_token_id=self.field("tokenizer.ggml.bos_token_id", -1),
        )
        scaling = of("rope.scaling.type", "none")
        check(scaling == "none", f"{self.path}: RoPE scaling {scaling}, which is not supported")
        if self.rope_freqs is not None:
            original = dict(low_freq_factor=1.0, high_freq_factor=4.0)
            original["original_max_position_embeddings"] = 8192
            factor = meant(self.rope_freqs.max())
            made["rope_scaling"] = dict(rope_type="llama3", factor=factor, **original)
            self.check_rope_freqs(made)
        return made

    def check_rope_freqs(self, made):
        """The file lists by how much each angle is slowed: it must be Llama 3's rule."""
        config = config_from(made, self.path, header=(0,))
        plain = config_from(made | dict(rope_scaling=None), self.path, header=(0,))
        cos, sin = rope_table(torch.ones(1), config)  # (1, dh): at position 1 an angle is its
        slow = torch.atan2(sin, cos)[0]  # (dh,)                 frequency
        cos, sin = rope_table(torch.ones(1), plain)
        ratio = torch.atan2(sin, cos)[0] / slow  # (dh,)
        ratio = ratio[: len(self.rope_freqs)]  # (dh/2,)
        same = torch.allclose(ratio, self.rope_freqs, rtol=1e-3)
        check(same, f"{self.path}: its rope_freqs are not those of Llama 3: not supported")

    def copy(self, name, to):
        """Copies a tensor into another one of the same shape, as numbers without blocks."""
        tensor = self.tensors[name]
        try:
            data = self.gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{self.path}: {kind} blocks cannot be read: give another") from None
        data = torch.tensor(np.array(data, np.float32))  # (rows, columns) or (n,)
        if self.arch in ("llama", "mistral") and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp turns neighbours (x_0, x_1); we and Hugging Face turn (x_i, x_{i + dh/2})
            half = self.made["head_dim"] // 2
            data = data.unflatten(0, (-1, half, 2))  # (heads, dh/2, 2, d)
            data = data.transpose(1, 2).flatten(0, 2)  # (heads * dh, d)
        copy_exactly(f"{self.path}: {name}", data, to)

    def tokenizer(self):
        """What the file says of its tokens, as a Hugging Face tokenizer.json, and that as ours."""
        kind = self.field("tokenizer.ggml.model")
        pre = self.field("tokenizer.ggml.pre", "gpt-2")
        line = f"{self.path}: a tokenizer of kind {kind}, {pre}, which is not supported"
        check(kind == "gpt2" and pre in GGUF_PRE, line)
        tokens = self.field("tokenizer.ggml.tokens")
        kinds = self.field("tokenizer.ggml.token_type")
        special = []
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
            if kind != NORMAL:
                special.append(dict(id=i, content=token, special=kind == CONTROL))
        vocab = {token: i for i, token in enumerate(tokens)}
        merges = self.field("tokenizer.ggml.merges")
        bos = next((t["content"] for t in special if t["id"] == self.made["bos_token_id"]), None)
        model = dict(type="BPE", vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
        made = dict(added_tokens=special, normalizer=None, pre_tokenizer=GGUF_PRE[pre], model=model)
        with tempfile.TemporaryDirectory() as folder:
            folder = make_directory(Path(folder, self.path.stem))  # the tokenizer's name
            write_json(folder / "tokenizer.json", made)
            return corpus.from_huggingface(folder / "tokenizer.json", bos)


# -- The shape --------------------------------------------------------------------------------


def size_in(made, path, name, default=None):
    """A whole number of a config.json that is at least 1."""
    value = made.get(name, default)
    if value is None:
        value = default
    check(value is not None, f"{path}: its config.json does not say {name}")
    fits = type(value) is int and value >= 1
    check(fits, f"{path}: its config.json has {name} {value!r}, which is no size")
    return value


def config_from(made, path, header, changes=None):
    """The Config of a config.json (a dict), or UserError for what we do not have.

    header: the token ids of the modified BOS. changes: fields of memories, and max_context.
    """
    family = made["model_type"]
    check(family in FAMILIES, f"{path}: model_type {family!r}; there are {', '.join(FAMILIES)}")

    def of(name, default=None):
        return size_in(made, path, name, default)

    # what is supported where it has this value, or none
    plain = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, partial_rotary_factor=1)
    for name, only in plain.items():
        value = made.get(name)
        check(value in (None, only), f"{path}: {name} {value!r} is not supported, only {only!r}")
    ours = made.get("memory3", {})
    check(isinstance(ours, dict), f"{path}: memory3 in its config.json is no object")
    heads = of("num_attention_heads")
    width = of("hidden_size")
    head_dim = of("head_dim", width // heads)
    shape = dict(
        n_layer=of("num_hidden_layers"),
        n_head=heads,
        n_kv_head=of("num_key_value_heads", heads),
        head_dim=head_dim,
        mlp_width=of("intermediate_size"),
        vocab_size=of("vocab_size"),
        norm_eps=made.get("rms_norm_eps", 1e-6),
        tied=made.get("tie_word_embeddings", False),
        width=0 if width == heads * head_dim else width,
        header=tuple(header),
    )
    # sec. 3.3: the layers between a quarter and three quarters of the depth, "the more sensible
    # choice" of its authors for any model (theirs has the first half)
    shape["n_memory_layer"] = max(1, shape["n_layer"] // 2)
    shape["memory_from"] = shape["n_layer"] // 4
    shape |= FAMILIES[family] | rope_fields(made, path) | ours
    shape |= changes or {}
    longest = longest_context(made, path, shape)
    wanted = shape.get("max_context", min(longest, 8192))
    check(type(wanted) is int, f"{path}: max_context {wanted!r} is no whole number")
    shape["max_context"] = wanted
    line = f"--max_context {wanted}: the model was made for {longest} beside header and reference"
    check(0 < wanted <= longest, line)
    return Config.from_dict(shape)


def rope_fields(made, path):
    """The fields of RoPE, as older (rope_theta, rope_scaling) and newer files have them."""
    rope = made.get("rope_parameters") or made.get("rope_scaling") or {}
    check(isinstance(rope, dict), f"{path}: the RoPE in its config.json is no object")
    part = rope.get("partial_rotary_factor")
    check(part in (None, 1), f"{path}: partial_rotary_factor {part!r} is not supported, only 1")
    base = rope.get("rope_theta") or made.get("rope_theta") or 10000.0
    found = dict(rope_base=base)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return found
    line = f"{path}: RoPE of type {kind!r} is not supported, only default and llama3"
    check(kind == "llama3", line)
    theirs = dict(
        rope_factor="factor",
        rope_low="low_freq_factor",
        rope_high="high_freq_factor",
        rope_original="original_max_position_embeddings",
    )
    for name, its in theirs.items():
        check(its in rope, f"{path}: its config.json does not say {its} of RoPE")
        found[name] = rope[its]
    return found


def longest_context(made, path, shape):
    """The most context tokens: no position beyond those that the model was made for, and none from
    which a token would lie outside of a sliding window, which we do not have."""
    longest = size_in(made, path, "max_position_embeddings", 2048)
    if made.get("sliding_window") and made.get("use_sliding_window", True):
        longest = min(longest, size_in(made, path, "sliding_window"))
    defaults = {f.name: f.default for f in fields(Config)}
    ref_len = size_in(shape, path, "ref_len", defaults["ref_len"])
    return longest - len(shape["header"]) - ref_len


# -- In ---------------------------------------------------------------------------------------


def free_memory():
    """Bytes of RAM that a process can still have."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # no Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_room(path, weights, tied, out):
    """Refuses what does not fit, before any tensor is read. weights: on the meta device."""
    sizes = {}
    for name, tensor in weights.items():
        sizes[name] = tensor.numel() * tensor.element_size()
    if tied:
        del sizes["head.weight"]  # the embedding again
    sizes = sizes.values()
    needed = sum(sizes) + max(sizes)  # the model, and the tensor on its way into it
    there = free_memory()
    need = f"{needed:,} bytes of memory, and {there:,} are free"
    check(needed <= there, f"{path} needs {need}: close programs, or take a larger machine")
    free = shutil.disk_usage(out).free
    check(sum(sizes) <= free, f"--out {out}: {sum(sizes):,} bytes to write, {free:,} are free")


def meta_weights(source, config, dtype):
    """Our state dict on the meta device: shapes without numbers. UserError unless the source has
    all the tensors that we need, and no others."""
    with torch.device("meta"):
        model = Memory3(config)
    wanted = {name for _, theirs in names(config) for name in theirs}
    missing = sorted(wanted - source.names)
    check(not missing, f"{source.path}: {len(missing)} weights are missing, first {missing[:1]}")
    ignored = {name for name in source.names if name.endswith("rotary_emb.inv_freq")}
    if config.tied:
        ignored.add("lm_head.weight")  # a copy of the embedding
    unknown = sorted(source.names - wanted - ignored)
    check(not unknown, f"{source.path}: no place for {len(unknown)} weights, first {unknown[:1]}")
    return model.to(dtype).state_dict()


def convert(path, out, dtype="auto", **changes):
    """A Hugging Face directory or a GGUF file -> a checkpoint directory of ours: model.pt with its
    meta.json, and tokenizer.json. changes: fields of Config that no weight depends on.

    Returns the Config. UserError, before anything is written, for what we do not have.
    """
    path = Path(path)
    source = HuggingFace(path) if path.is_dir() else Gguf(path)
    itself = Path(out).resolve() == path.resolve()
    check(not itself, f"--out {out} is the model itself: give another directory")
    tokenizer = source.tokenizer()
    config = config_from(source.made, path, tokenizer.header, changes)
    if dtype == "auto":  # bfloat16 stays so; all else is exact in float32
        dtype = "bfloat16" if source.all_bfloat16 else "float32"
    dtype = getattr(torch, dtype)
    shapes = meta_weights(source, config, dtype)
    out = make_directory(out)
    check_room(path, shapes, config.tied, out)
    weights = {}
    for ours, theirs in names(config):
        weights[ours] = torch.empty(shapes[ours].shape, dtype=dtype)
        rows = row_counts(config, ours) or [len(weights[ours])]
        for name, part in zip(theirs, weights[ours].split(rows), strict=True):
            source.copy(name, part)
    if config.tied:
        weights["head.weight"] = weights["embed.weight"]
    meta = dict(config=asdict(config), stage="implicit", step=0, tokenizer=tokenizer.id)
    tokenizer.save(out / "tokenizer.json")
    save_checkpoint(out / "model.pt", weights, meta | dict(source=path.name))
    return config


# -- Out --------------------------------------------------------------------------------------


def to_huggingface(path, out):
    """A checkpoint directory of ours -> config.json, .safetensors and, where the checkpoint's
    directory has a tokenizer.json, that. transformers loads it, as an ordinary decoder; the fields
    of memories are in config.json under "memory3", and `convert` takes them up again."""
    safetensors = optional("safetensors.torch")
    model, _ = load_checkpoint(path)
    config = model.config
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    itself = Path(out).resolve() == folder.resolve()
    check(not itself, f"--out {out} is the checkpoint itself: give another directory")
    made = Path(out, "config.json")
    ours = made.exists() and "memory3" in read_json(made, {}, "give another --out")
    foreign = [*Path(out).glob("*.safetensors*")] and not ours
    check(not foreign, f"--out {out} holds another model: give another directory")
    out = make_directory(out)
    theirs_dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    write_json(out / "config.json", made_from(config) | dict(torch_dtype=theirs_dtype))
    weights = model.state_dict()
    shards = [{}]
    size = 0
    for ours, theirs in names(config):
        tensor = weights[ours]
        rows = row_counts(config, ours) or [len(tensor)]
        for name, part in zip(theirs, tensor.split(rows), strict=True):
            n_bytes = part.numel() * part.element_size()
            if size + n_bytes > SHARD and shards[-1]:
                shards.append({})
                size = 0
            shards[-1][name] = part
            size += n_bytes
    for old in out.glob("*.safetensors*"):
        old.unlink()
    where = {}
    for i, shard in enumerate(shards):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(shard, name)
        copies = {key: part.clone() for key, part in shard.items()}  # no two share their bytes
        safetensors.save_file(copies, out / name, metadata=dict(format="pt"))
    if len(shards) > 1:
        total = sum(
            part.numel() * part.element_size() for shard in shards for part in shard.values()
        )
        index = dict(metadata=dict(total_size=total), weight_map=where)
        write_json(out / "model.safetensors.index.json", index)
    if (folder / "tokenizer.json").exists():
        write_tokenizer(corpus.tokenizer(f"{folder}/"), out)
    return config


def made_from(config):
    """A Config as a config.json of Hugging Face."""
    c = config
    check(not (c.qkv_bias and c.qk_norm), "no family has both a bias and a norm of q and k")
    family = "llama"
    if c.qkv_bias:
        family = "qwen2"
    if c.qk_norm:
        family = "qwen3"
    rope = dict(rope_type="default", rope_theta=c.rope_base)
    if c.rope_factor > 1:
        rope |= dict(rope_type="llama3", factor=c.rope_factor)
        rope |= dict(low_freq_factor=c.rope_low, high_freq_factor=c.rope_high)
        rope["original_max_position_embeddings"] = int(c.rope_original)
    kept = {name: value for name, value in asdict(c).items() if name not in OF_WEIGHTS}
    return dict(
        architectures=[f"{family.capitalize()}ForCausalLM"],
        model_type=family,
        num_hidden_layers=c.n_layer,
        hidden_size=c.n_embd,
        intermediate_size=c.mlp_width,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        hidden_act="silu",
        vocab_size=c.vocab_size,
        tie_word_embeddings=c.tied,
        max_position_embeddings=c.max_context + len(c.header) + c.ref_len,
        rope_theta=c.rope_base,  # for transformers before version 5
        rope_scaling=rope if c.rope_factor > 1 else None,
        rope_parameters=rope,
        bos_token_id=c.header[0],
        memory3=kept,
    )


def write_tokenizer(tokenizer, out):
    """A Tokenizer as tokenizer.json and tokenizer_config.json of Hugging Face."""
    letters = {byte: letter for letter, byte in corpus.bytes_of_letters().items()}
    ranks = tokenizer.encoding._mergeable_ranks

    def spelled(token):
        return "".join(letters[byte] for byte in token)

    vocab = {}
    merges = []
    for token, i in sorted(ranks.items(), key=lambda pair: pair[1]):
        if i >= tokenizer.n_vocab:
            continue  # a byte that the vocabulary lacks
        vocab[spelled(token)] = i
        parts = merge_of(token, ranks)
        if len(parts) == 2:
            merges.append([spelled(parts[0]), spelled(parts[1])])
    added = []
    for token, i in sorted(tokenizer.encoding._special_tokens.items(), key=lambda pair: pair[1]):
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        is_special = token not in tokenizer.added
        added.append(dict(id=i, content=token, special=is_special, **flags))
        vocab[token] = i
    pre_tokenizer = split_by(*tokenizer.cuts, tokenizer.encoding._pat_str)
    if tokenizer.prefix_space:  # theirs puts it before a first tab or line feed, too
        pre_tokenizer["pretokenizers"].insert(0, corpus.FIRST_SPACE)
    bos = next(t["content"] for t in added if t["id"] == tokenizer.bos)
    model = dict(type="BPE", vocab=vocab, merges=merges, ignore_merges=True, byte_fallback=False)
    made = dict(
        version="1.0",
        added_tokens=added,
        normalizer=dict(type="NFC"),
        pre_tokenizer=pre_tokenizer,
        decoder=BYTES,
        model=model,
    )
    write_json(out / "tokenizer.json", made)
    write_json(
        out / "tokenizer_config.json",
        dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=bos),
    )


def merge_of(token, ranks):
    """The two tokens that are merged last into this one: found by merging it anew, with all merges
    that come before its own.

    >>> merge_of(b"abc", {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"abc": 4})
    [b'a', b'bc']
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:], strict=False)]
        best = min(pairs)
        if best >= limit:
            break
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# -- Command line -----------------------------------------------------------------------------


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("path", help="a Hugging Face directory, a .gguf file, or a checkpoint of ours")
    p.add_argument("--out", required=True, help="the directory to write")
    p.add_argument("--to_hf", action="store_true", help="out of our format, into Hugging Face's")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                   help="of the weights; auto: as in the file, or float32")  # fmt: skip
    defaults = {f.name: f.default for f in fields(Config)}
    for name in (*OF_MEMORIES, "max_context"):
        text = f"as in train.py (default {defaults[name]})"
        if name == "n_memory_layer":
            text = "layers that keep memories (default: half of all)"
        if name == "memory_from":
            text = "the first of them (default: at a quarter of the depth)"
        if name == "max_context":
            text = "longest context (default: what the model was made for, at most 8192)"
        p.add_argument(f"--{name}", type=int, help=text)
    a = p.parse_args(argv)
    changes = {}
    for name in (*OF_MEMORIES, "max_context"):
        if getattr(a, name) is not None:
            changes[name] = getattr(a, name)
    if a.to_hf:
        given = ", ".join(f"--{name}" for name in changes)
        check(not changes, f"{given}: not with --to_hf, which changes no number")
        check(a.dtype == "auto", "--dtype: not with --to_hf, which changes no number")
        config = to_huggingface(a.path, a.out)
    else:
        check(Path(a.path).exists(), f"{a.path}: no such file or directory")
        config = convert(a.path, a.out, a.dtype, **changes)
    print(f"{a.out}: {json.dumps(asdict(config))}")
    print(f"{config.n_params:,} non-embedding weights; a memory has {config.memory_shape}")
    if not a.to_hf:
        made = command("train.py", "--init", a.out, "--stage", "explicit")
        print(f"It cannot read memories yet: {made} ...")


if __name__ == "__main__":
    run(main)
