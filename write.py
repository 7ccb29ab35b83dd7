"""Warm start: writes a knowledge base into explicit memories before any question (sec. 3.1).

    python write.py --data data/cities --references kb --out out/kb.bank
    python write.py --quantize out/kb.codes           the same, and as codes of few bytes (sec. 3.3)

Stopped and called again it goes on where it was; where all is written it says so.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

import corpus
from memory import MemoryBank, attention_path
from model import find_device, load_checkpoint
from quantize import layout

def main(args):
    """Writes the bank, and with args.quantize its quantized twin; returns the bank (of --out)."""
    device = find_device(args.device)
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: at least 1")
    if args.codec:
        layout(args.codec)  # a string that is no codec is refused before the work
    model = load_checkpoint(args.checkpoint)[0].to(device).eval()
    tokenizer = corpus.tokenizer(corpus.manifest(args.data)["tokenizer"])
    if tuple(tokenizer.header) != model.config.header:
        raise ValueError(f"--data {args.data} has another tokenizer than {args.checkpoint} wants")
    references = corpus.References.open(Path(args.data) / args.references)
    bank = MemoryBank.create(args.out, model, references, args.dtype)
    total = len(bank) * bank.record_bytes
    card = torch.cuda.get_device_name() if device.type == "cuda" else device
    dtype, longest = model.embed.weight.dtype, model.config.ref_len + len(model.config.header)
    path, why = attention_path(model.device, dtype, longest)
    print(
        f"device: {card}, {dtype}; attention: {path} ({why})\n"
        f"bank: {args.out}, {len(bank):,} memories of {bank.record_bytes:,} bytes ({args.dtype} "
        f"{bank.shape}), {total:,} bytes in all"
    )
    on_disk = os.stat(bank.path / "memories.bin").st_blocks * 512  # the file is sparse
    if (free := shutil.disk_usage(bank.path).free) < total - on_disk:
        raise OSError(f"--out {args.out}: {total - on_disk:,} bytes to write, {free:,} are free")
    fill(bank, args.batch)
    if args.quantize:
        if spec := outdated(args.quantize, bank):
            args.codec = args.codec or spec
            print(f"{args.quantize}: the references have changed since, so it is made anew")
            shutil.rmtree(args.quantize)
        if (Path(args.quantize) / "meta.json").exists():
            codes = MemoryBank.open(args.quantize, model, references)
            if not codes.codec:
                raise ValueError(f"--quantize {args.quantize} holds a bank that is not quantized")
            if args.codec not in (None, has := codes.codec.spec):
                raise ValueError(f"{args.quantize} has codec {has}; remove it, or drop --codec")
            fill(codes, args.batch)
        else:
            began = time.time()
            codes = bank.quantize(args.quantize, spec=args.codec)
            print(f"quantized in {time.time() - began:.1f} s, training the codec included")
        keys, values = relative_error(bank, codes)
        print(
            f"codes: {args.quantize}, {codes.codec.spec}, {codes.record_bytes:,} bytes a memory, "
            f"{bank.record_bytes / codes.record_bytes:.1f} times fewer; relative error of keys "
            f"{keys:.3f}, of values {values:.3f}"
        )
    return bank

def outdated(path, bank):
    """The codec of a quantized twin of this bank at `path`, if it is of an older text; else ""."""
    meta = Path(path) / "meta.json"
    old = json.loads(meta.read_text()) if meta.exists() else {}
    same = all(old.get(key) == bank.meta[key] for key in ("format", "fingerprint", "references"))
    older = same and old["codec"] and old["references_hash"] != bank.meta["references_hash"]
    return old["codec"].rsplit(":", 1)[0] if older else ""

def fill(bank, batch):
    began = time.time()
    n = bank.write(batch)
    rate = f"{n:,} written, {n / (time.time() - began):,.0f} memories/s"
    print(f"{bank.path}: {rate if n else 'complete, nothing to write'}")

def relative_error(bank, codes, n=256):
    """|codes - bank| / |bank| over the keys and over the values of n memories."""
    ids = np.random.default_rng(0).permutation(bank.live())[:n]
    x, y = bank.recall(ids).kv.float(), codes.recall(ids).kv  # (n, Lm, 2, Hkv, S, dh)
    return [float((y - x)[:, :, j].norm() / x[:, :, j].norm()) for j in (0, 1)]

def command_line(argv=None):
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    p.add_argument("--checkpoint", default="checkpoints/toy", help="the model that writes")
    p.add_argument("--data", default="data/cities", help="a prepared data directory")
    p.add_argument("--references", default="kb", help="which of its reference files")
    p.add_argument("--out", default="out/kb.bank", help="directory of the bank")
    p.add_argument("--dtype", default="bfloat16", help="of the bank: bfloat16 or float32")
    p.add_argument("--quantize", help="directory of a quantized bank, made besides")
    p.add_argument("--codec", help="FAISS string of its codec (None: chosen by size)")
    p.add_argument("--batch", type=int, default=64, help="references at a time")
    p.add_argument("--device", default="auto", help="cuda, cpu, or auto: cuda where there is one")
    return p.parse_args(argv)

if __name__ == "__main__":
    try:
        main(command_line())
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        sys.exit(f"write.py: {e}")
    except KeyboardInterrupt:
        sys.exit("write.py: stopped; the same command goes on")
