"""A shape that a text and some minutes can feed, from a measurement on this machine.

    python data/text/shape.py --data out/notes --minutes 30 --file out/notes/shape.txt

Writes flags of train.py into the file, and says what they mean and what to expect. Its first line
is the shape, its second what both stages have in common, its third the minutes of each. With --init
the first line is empty: the checkpoint has its shape.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import corpus  # noqa: E402
import cost  # noqa: E402
from common import check, find_device, number, replace_file, run  # noqa: E402
from model import Config, load_checkpoint  # noqa: E402
from train import TrainConfig, measure  # noqa: E402

# From small to large. Half of the layers or more write and read memories, as in the paper.
SHAPES = [
    dict(n_layer=4, n_memory_layer=2, n_head=2, n_kv_head=2, head_dim=32, mlp_width=192),
    dict(n_layer=6, n_memory_layer=4, n_head=4, n_kv_head=4, head_dim=32, mlp_width=384),
    dict(n_layer=8, n_memory_layer=4, n_head=8, n_kv_head=4, head_dim=32, mlp_width=768),
    dict(n_layer=12, n_memory_layer=6, n_head=6, n_kv_head=2, head_dim=64, mlp_width=1152),
    dict(n_layer=12, n_memory_layer=6, n_head=12, n_kv_head=4, head_dim=64, mlp_width=2304),
    dict(n_layer=24, n_memory_layer=12, n_head=16, n_kv_head=4, head_dim=64, mlp_width=3072),
]
# Tokens that a weight should see. The lowest loss for a given time is near 20 (Hoffmann et al.
# 2022); reading memories wants a larger model rather than a smaller one, so we accept 5.
TOKENS_A_WEIGHT = 5
MOST = 100_000_000  # tokens of a text that its entropy is taken from
EPOCHS = 8  # a text that is read more often than this teaches little more
IMPLICIT_SHARE = 0.6  # of the minutes; the explicit stage has the rest
# What the World Factbook had (own.sh with 60 minutes, see readme.md): the tokens that the implicit
# stage had seen, and the loss on held-out text then, in nats a token. Its unigram entropy is 6.38.
FACTBOOK = [(1.0e6, 3.16), (2.0e6, 2.54), (4.1e6, 2.11), (8.2e6, 1.92), (12.1e6, 1.72)]
FACTBOOK_ENTROPY = 6.38


@dataclass
class Plan:
    """What a shape comes to in the minutes that there are."""

    config: Config
    rate: float  # tokens a second in the implicit stage
    seen: float  # tokens in both stages together
    epochs: float


def plan(config, rate, minutes, n_tokens):
    """The Plan of a shape whose implicit stage makes `rate` tokens a second.

    A step of the explicit stage costs more (cost.step_flops), since it writes its references.
    """
    seconds = 60 * minutes
    slower = cost.step_flops(config, True) / cost.step_flops(config, False)
    seen = rate * seconds * (IMPLICIT_SHARE + (1 - IMPLICIT_SHARE) / slower)
    return Plan(config, rate, seen, seen / n_tokens)


def is_fed(made):
    """Whether the text and the time suffice for a shape."""
    useful = made.seen * min(1, EPOCHS / made.epochs)
    return useful >= TOKENS_A_WEIGHT * made.config.n_params


def choose(data, minutes, chunk_len, ref_len, context, batch, device):
    """The largest of SHAPES that is fed; the smallest, if none is.

    The smallest is measured. What a larger one would make follows from its FLOPs; once chosen, it
    is measured, too, and given back for the next smaller if it is slower than that.
    """
    tokenizer = corpus.tokenizer(data)
    n_tokens = len(corpus.open_tokens(data, "train"))
    common = dict(vocab_size=tokenizer.n_vocab, header=tuple(tokenizer.header), tied=True)
    common |= dict(chunk_len=chunk_len, ref_len=ref_len, max_context=max(512, context))
    common |= dict(memory_tokens=16, n_recall=5)
    configs = [Config(**shape, **common) for shape in SHAPES]
    cfg = TrainConfig(data=data, split="train", context=context, batch=batch, device=device)
    first = measure(cfg, configs[0])
    chosen = plan(configs[0], first, minutes, n_tokens)
    for config in reversed(configs[1:]):
        rate = first * cost.step_flops(configs[0], False) / cost.step_flops(config, False)
        if not is_fed(plan(config, rate, minutes, n_tokens)):
            continue
        measured = plan(config, measure(cfg, config), minutes, n_tokens)
        if is_fed(measured):
            return measured
    return chosen


def flags_of(config):
    """The shape as flags of train.py."""
    names = (*SHAPES[0], "memory_tokens", "chunk_len", "ref_len", "max_context")
    flags = " ".join(f"--{name} {getattr(config, name)}" for name in names)
    return f"--preset toy {flags}"


def expected(made):
    """What such a model can be expected to do, in one sentence."""
    if made.seen < 3e6:
        return "words and phrases of your text, in an order that makes little sense"
    if made.seen < 5e7:
        return "sentences in the manner of your text; what they say is mostly made up"
    return "fluent sentences in the manner of your text, right where it says a thing often"


def unigram_entropy(tokens, n_vocab):
    """Nats a token that a text costs whoever knows how often each token occurs, and no more.

    >>> round(unigram_entropy(np.array([3, 3, 5, 5]), 7), 3)  # ln 2
    0.693
    """
    counts = np.bincount(tokens, minlength=n_vocab)
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())


def expected_loss(entropy, seen):
    """What loss to expect, in a line or two. seen: tokens in the implicit stage."""
    nearest, loss = min(FACTBOOK, key=lambda measured: abs(np.log(measured[0] / max(seen, 1))))
    return (
        f"loss: a model that only knows how often each token occurs has {entropy:.2f} nats a token "
        f"here; get far below.\n"
        f"    Measured on another text, the World Factbook ({FACTBOOK_ENTROPY} nats): {loss} on "
        f"held-out text after {nearest / 1e6:.0f} million tokens; here {seen / 1e6:.1f} million"
    )


def validation_splits(data, context):
    """The splits whose loss is shown: heldout and val, if they are as long as a window."""
    long_enough = []
    for name in ("heldout", "val"):
        if Path(data, f"{name}.bin").exists() and len(corpus.open_tokens(data, name)) >= context:
            long_enough.append(name)
    if not long_enough:
        print(
            f"too little is held out of the training text for a window of {context} tokens: the "
            f"loss on 'train' shows what is learnt by heart"
        )
        return ["train"]
    return long_enough


def report(made, minutes, n_tokens, entropy, init):
    config = made.config
    implicit = IMPLICIT_SHARE * minutes
    hope = expected(made)
    if init:
        hope = f"what {init} can do, with some of your text's words and manner"
    print(
        f"text: {n_tokens:,} tokens; time: {minutes:g} minutes, of which {implicit:g} for the "
        f"implicit stage\n"
        f"shape: {config.n_layer} layers of width {config.n_embd}, {config.n_memory_layer} with "
        f"memories; {config.n_params:,} weights besides the embeddings\n"
        f"speed here: {made.rate:,.0f} tokens a second, so {made.seen:,.0f} tokens in all: "
        f"{made.epochs:.1f} times the text, {made.seen / config.n_params:.1f} tokens a weight\n"
        f"{expected_loss(entropy, made.rate * 60 * implicit)}\n"
        f"expect: {hope}. Whether memories help is in the table at the end: compare its "
        f"rows 'recalled' and 'random'."
    )
    if made.epochs > EPOCHS:
        print(f"the text is short for so many minutes: more text helps, more than {EPOCHS} epochs")
    elif not init and not is_fed(made):
        print("the time is short for any shape: more minutes help")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--data", help="a data set made by prepare.py")
    p.add_argument("--minutes", type=number(float, 0.001), default=30.0, help="of both stages")
    p.add_argument("--file", help="where the flags go")
    p.add_argument("--lengths", action="store_true", help="only print those of --init")
    p.add_argument("--init", default="", help="a checkpoint to start from")
    p.add_argument("--chunk_len", type=number(int, 1), default=32)
    p.add_argument("--ref_len", type=number(int, 16), default=64)
    p.add_argument("--context", type=number(int, 1), default=256)
    p.add_argument("--batch", type=number(int, 1), default=16)
    p.add_argument("--device", default="auto", help="cuda, cpu or auto")
    a = p.parse_args(argv)
    if a.lengths:
        config = load_checkpoint(a.init)[0].config
        context = min(config.max_context, 8 * config.chunk_len)
        context -= context % config.chunk_len
        check(context, f"{a.init}: its max_context is shorter than a chunk of {config.chunk_len}")
        print(config.chunk_len, config.ref_len, context)
        return
    check(a.data and a.file, "--data and --file are missing")
    print(f"measuring on {find_device(a.device)} ...", flush=True)
    tokens = corpus.open_tokens(a.data, "train")
    n_tokens = len(tokens)
    line = f"{a.data}: {n_tokens:,} tokens of training text, a window has {a.context}"
    check(n_tokens >= a.context, f"{line}: give more text")
    entropy = unigram_entropy(tokens[:MOST], corpus.manifest(a.data)["n_vocab"])
    if a.init:
        config = load_checkpoint(a.init)[0].config
        lengths = dict(context=a.context, batch=a.batch)
        cfg = TrainConfig(data=a.data, split="train", device=a.device, **lengths)
        made = plan(config, measure(cfg, config), a.minutes, n_tokens)
        shape = ""
    else:
        lengths = (a.chunk_len, a.ref_len, a.context)
        made = choose(a.data, a.minutes, *lengths, a.batch, a.device)
        shape = flags_of(made.config)
    report(made, a.minutes, n_tokens, entropy, a.init)
    # a warmup of 100 steps is for runs of thousands
    steps = made.rate * 60 * a.minutes * IMPLICIT_SHARE / (a.context * a.batch)
    warmup = max(1, min(100, int(steps / 20)))
    val = ",".join(validation_splits(a.data, a.context))
    common = f"--context {a.context} --batch {a.batch} --warmup {warmup} --val {val}"
    minutes = f"{IMPLICIT_SHARE * a.minutes:g} {(1 - IMPLICIT_SHARE) * a.minutes:g}"
    lines = f"{shape}\n{common}\n{minutes}\n"
    replace_file(a.file, lambda file: file.write(lines.encode()))
    print(f"{a.file}: {shape} {common}")


if __name__ == "__main__":
    run(main)
