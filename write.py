"""Warm start: writes a knowledge base into explicit memories before any question (sec. 3.1).

    python write.py --data data/cities --references kb
    python write.py --quantize      also the same memories in fewer bytes (sec. 3.3)
    python write.py --data data/mine --whole_documents --out out/whole      (Remark 3.2)
    torchrun --nproc_per_node 4 write.py        the same, its memories by four processes, a GPU each
    python write.py --shard 1/4     a quarter of the memories, without the index; when all four have
                                    run, at once or not, the same command without --shard makes it

The texts are copied into --out, which is the knowledge base from then on: kb.py changes it. If
write.py is stopped, the same command goes on where it was; it says so when nothing is left to do.
"""

import argparse
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np

import corpus
import parallel
from bank import MemoryBank, Texts
from common import UserError, check, command, find_device, run, shard, torchrun_share
from embed import KINDS, full_name
from generate import BANK, place
from memory import attention_path
from model import load_checkpoint
from quantize import layout
from retrieval import Live, Relevance, choice


def main(args):
    """Writes the memories, the index, and with args.quantize the codes; returns the bank."""
    later = ("quantize", "codec", "embedder", "factory")
    given = [f"--{name}" for name in later if getattr(args, name)]
    if args.shard and given:
        order = f"first {without(args, *later)} and the other shards, then {without(args, 'shard')}"
        raise UserError(f"{given[0]}: a shard is of memories alone; {order}")
    args.out = place(args.out, args.data, Path(args.references or "kb").name)
    check(args.batch > 0, f"--batch {args.batch}: at least 1")
    if args.codec:
        layout(args.codec)  # refuses a string that is no codec before any work is done
    device = find_device(args.device)
    rank = 0
    share = args.shard or (1, 1)
    if torchrun_share() and not args.shard:
        rank, size, device = parallel.join(device)
        share = rank + 1, size
    bank = parallel.together(open_all, args, device)
    began = time.time()
    n = parallel.together(partial(bank.write, args.batch, shard=share))
    n = sum(parallel.everywhere(n))
    rate = n / (time.time() - began)
    done = f"{n:,} written, {rate:,.0f} memories/s" if n else "complete, nothing to write"
    print(f"{bank.path}: {done}")
    if args.shard:
        i, of = share
        print(f"shard {i} of {of} is done; when all are, the index: {without(args, 'shard')}")
    elif rank == 0:  # the memories of all are there
        write_index(bank, args.embedder, args.factory, other_base(args))
        if args.quantize or args.codec:
            quantize(bank, args.codec)
    return bank


def without(args, *names):
    """The command that was given, but for these flags."""
    words = []
    for name, value in vars(args).items():
        if name in names or value == parser().get_default(name):
            continue
        words.append(f"--{name}")
        if name == "shard":
            words.append(f"{value[0]}/{value[1]}")
        elif value is not True:
            words.append(value)
    return command("write.py", *words)


def open_all(args, device):
    """The base, with the model that writes it; says what will be written."""
    model = load_checkpoint(args.checkpoint, verify=not args.no_verify)[0]
    model.to(device).eval()
    bank = open_base(args, model)
    report(args, bank)
    check_space(args, bank)
    return bank


def open_base(args, model):
    """The base at --out; if there is none, it is made of --data and --references."""
    if Texts.exists(args.out) and not args.references:
        bank = MemoryBank.open(args.out, model)
        found = bank.meta["dtype"]
        line = f"{args.out} is a bank of {found}, not of {args.dtype}: drop --dtype"
        check(args.dtype in (None, found), line)
        if args.whole_documents:
            bank.check_documents(True)
        return bank
    other = other_base(args)
    if other:
        source = Texts(other)
        data = other
    else:
        source = corpus.References.open(Path(args.data) / (args.references or "kb"))
        data = args.data
    same_header = tuple(corpus.tokenizer(data).header) == model.config.header
    check(same_header, f"{data} has another tokenizer than {args.checkpoint} was trained with")
    dtype = args.dtype or "bfloat16"
    return MemoryBank.create(args.out, model, source, dtype, args.whole_documents)


def other_base(args):
    """The base whose texts this model is to write, too, if --references names one."""
    name = args.references  # without it, the data set's own kb, whatever lies in this directory
    return name if name and Texts.exists(name) else None


def report(args, bank):
    """Says what runs, and how many bytes it will write."""
    config = bank.model.config
    dtype = bank.model.embed.weight.dtype
    longest = config.ref_len + len(config.header)
    path, why = attention_path(bank.device, dtype, longest, config.head_dim)
    print(f"device: {bank.device}, {dtype}; attention: {path} ({why})")
    n = bank.references.count_live()
    size = f"{bank.record_bytes:,} bytes ({bank.meta['dtype']} {bank.shape})"
    total = n * bank.record_bytes
    print(f"bank: {args.out}, {n:,} memories of {size}, {total:,} bytes in all")
    if bank.n_pieces:
        print(f"whole documents: {2 * bank.half} references are encoded as one sequence")


def check_space(args, bank):
    """UserError if the disk has no room for the memories that are not written yet."""
    file = bank.path / "memories.bin"
    written = file.stat().st_blocks * 512 if file.exists() else 0  # on disk: the file is sparse
    total = bank.references.count_live() * bank.store.stride
    left = total - written
    free = shutil.disk_usage(bank.path).free
    check(free >= left, f"--out {args.out}: {left:,} bytes to write, {free:,} are free")


def write_index(bank, encoder=None, factory=None, other=None):
    """Makes the index that finds references by text, or brings it up to date. encoder None: that
    of the index, of `other`, or hash. other: the base that has the same texts; what `calibrate`
    has learnt of them there holds here, too."""
    references = bank.references
    how = dict(model=bank.model, bank=bank)
    live = None
    if Live.exists(references):
        live = Live.open(references, bank.model).save()
        equal = encoder is None or full_name(encoder) == live.embedder.name
        equal = equal and factory in (None, live.meta.get("chosen"))
        if not equal:
            live = None
    if live is None:
        if other and encoder is None and not choice(other)[0].startswith("self:"):
            encoder, chosen = choice(other)
            factory = factory or chosen
        live = Live.build(references, encoder, factory, **how)
        learnt = Relevance.open(other) if other else None
        if learnt and not live.relevance:
            learnt.save(bank.path)
    factory = live.meta.get("factory", "keys of the memories")
    print(f"{live.path}: {len(live):,} references, {live.embedder.id}, {factory}")


def quantize(bank, spec):
    """Makes or completes the quantized memories (sec. 3.3), and prints their error."""
    began = time.time()
    codes = bank.quantize(spec)
    seconds = time.time() - began
    print(f"quantized in {seconds:.1f} s, training the codec included")
    keys, values = relative_error(bank, codes)
    fewer = bank.record_bytes / codes.record_bytes
    size = f"{codes.record_bytes:,} bytes a memory, {fewer:.1f} times fewer"
    error = f"relative error of keys {keys:.3f}, of values {values:.3f}"
    print(f"codes: {codes.path}/codes, {codes.codec.spec}, {size}; {error}")


def relative_error(bank, codes, n=256):
    """|codes - bank| / |bank| over the keys and over the values of n memories: two numbers."""
    ids = np.random.default_rng(0).permutation(bank.live())[:n]
    exact = bank.recall(ids).kv.float()  # (n, Lm, 2, Hkv, S, dh)
    decoded = codes.recall(ids).kv  # (n, Lm, 2, Hkv, S, dh)
    errors = []
    for which in (0, 1):  # keys, values
        x = exact[:, :, which]  # (n, Lm, Hkv, S, dh)
        y = decoded[:, :, which]
        error = (y - x).norm() / x.norm()
        errors.append(float(error))
    return errors


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    p.add_argument("--checkpoint", default="checkpoints/toy", help="the model that writes")
    p.add_argument("--data", default="data/cities", help="a prepared data directory")
    p.add_argument(
        "--references", help="its reference file (None: kb), or a knowledge base to copy"
    )
    p.add_argument("--out", default=BANK, help="directory of the knowledge base")
    dtype = "of the memories (None: the base's, or bfloat16)"
    p.add_argument("--dtype", choices=["bfloat16", "float32"], help=dtype)
    complete = "encode the references of a document as one sequence (Remark 3.2)"
    p.add_argument("--whole_documents", action="store_true", help=complete)
    p.add_argument("--quantize", action="store_true", help="also make the quantized memories")
    p.add_argument("--codec", help="FAISS string of their codec (None: chosen by size)")
    p.add_argument("--embedder", help=f"{KINDS} (None: the index's, or hash)")
    p.add_argument("--factory", help="FAISS factory string of the index (None: chosen by size)")
    p.add_argument("--batch", type=int, default=64, help="references at a time")
    part = "i/n: only this share of the memories, as one of n processes on the same --out"
    p.add_argument("--shard", type=shard, metavar="i/n", help=part)
    no_verify = "skip the checkpoint's checksum: 3 to 6 s sooner for a 2.4b"
    p.add_argument("--no_verify", action="store_true", help=no_verify)
    p.add_argument("--device", default="auto", help="cuda, cpu, or auto: cuda where there is one")
    return p


def command_line(argv=None):
    return parser().parse_args(argv)


def cli():
    parallel.run(main, command_line())


if __name__ == "__main__":
    run(cli)
