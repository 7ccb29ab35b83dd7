"""Warm start: writes a knowledge base into explicit memories before any question (sec. 3.1).

    python write.py --data data/cities --references kb
    python write.py --quantize out/cities/kb.codes    the same, and as codes of few bytes (sec. 3.3)

Stopped and called again it goes on where it was; where all is written it says so.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np

import corpus
from bank import MemoryBank
from common import check, find_device, run
from generate import BANK, place
from memory import attention_path
from model import load_checkpoint
from quantize import layout


def main(args):
    """Writes the bank, and with args.quantize its quantized twin; returns the bank (of --out)."""
    args.out = place(args.out, args.data, args.references)
    check(args.batch > 0, f"--batch {args.batch}: at least 1")
    if args.codec:
        layout(args.codec)  # a string that is no codec is refused before the work
    model = load_checkpoint(args.checkpoint)[0].to(find_device(args.device)).eval()
    same = tuple(corpus.tokenizer(args.data).header) == model.config.header
    check(same, f"--data {args.data} has another tokenizer than {args.checkpoint} wants")
    references = corpus.References.open(Path(args.data) / args.references)
    bank = MemoryBank.create(args.out, model, references, args.dtype)
    total = len(bank) * bank.record_bytes
    dtype, longest = model.embed.weight.dtype, model.config.ref_len + len(model.config.header)
    path, why = attention_path(model.device, dtype, longest, model.config.head_dim)
    print(f"device: {model.device}, {dtype}; attention: {path} ({why})")
    print(
        f"bank: {args.out}, {len(bank):,} memories of {bank.record_bytes:,} bytes ({args.dtype} "
        f"{bank.shape}), {total:,} bytes in all"
    )
    left = total - (bank.path / "memories.bin").stat().st_blocks * 512  # the file is sparse
    free = shutil.disk_usage(bank.path).free
    check(free >= left, f"--out {args.out}: {left:,} bytes to write, {free:,} are free")
    fill(bank, args.batch)
    if args.quantize:
        quantize(args.quantize, bank, args.codec, args.batch)
    return bank


def quantize(path, bank, spec, batch):
    """The quantized twin of this bank at `path` (sec. 3.3): completed, made, or made anew."""
    file = Path(path) / "meta.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    ours = all(old.get(key) == bank.meta[key] for key in ("format", "fingerprint", "references"))
    if ours and old["codec"] and old["references_hash"] != bank.meta["references_hash"]:
        print(f"{path}: the references have changed since, so it is made anew")
        spec = spec or old["codec"].rsplit(":", 1)[0]
        shutil.rmtree(path)
    if file.exists():
        codes = MemoryBank.open(path, bank.model, bank.references)
        check(codes.codec, f"--quantize {path} holds a bank that is not quantized")
        its = codes.codec.spec
        check(spec in (None, its), f"{path} has codec {its}; remove it, or drop --codec")
        fill(codes, batch)
    else:
        began, codes = time.time(), bank.quantize(path, spec=spec)
        print(f"quantized in {time.time() - began:.1f} s, training the codec included")
    error = "of keys {:.3f}, of values {:.3f}".format(*relative_error(bank, codes))
    print(
        f"codes: {path}, {codes.codec.spec}, {codes.record_bytes:,} bytes a memory, "
        f"{bank.record_bytes / codes.record_bytes:.1f} times fewer; relative error {error}"
    )


def fill(bank, batch):
    """Encodes the references whose memories are missing, `batch` at a time, and says how fast."""
    began, n = time.time(), bank.write(batch)
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
    p.add_argument("--out", default=BANK, help="directory of the bank")
    p.add_argument("--dtype", default="bfloat16", help="of the bank: bfloat16 or float32")
    p.add_argument("--quantize", help="directory of a quantized bank, made besides")
    p.add_argument("--codec", help="FAISS string of its codec (None: chosen by size)")
    p.add_argument("--batch", type=int, default=64, help="references at a time")
    p.add_argument("--device", default="auto", help="cuda, cpu, or auto: cuda where there is one")
    return p.parse_args(argv)


if __name__ == "__main__":
    run(lambda: main(command_line()))
