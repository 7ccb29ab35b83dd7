"""Tokenizers of your own (sec. 4.3): train one, or join two.

    python data/text/vocabulary.py merge data/cities out/mine --out out/both

The paper joined the 32,000 tokens of LLaMA2 and about as many Chinese ones; after duplicates were
removed, 60,299 were left. prepare.py trains one with --tokenizer bpe:VOCAB.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import corpus  # noqa: E402
from common import UserError, check, make_directory, optional, run  # noqa: E402

# Inside these pieces pairs are merged: words with their space, two digits at most (a number is then
# a few common tokens, not one rare one), punctuation, spaces. Marks belong to their letter.
PATTERN = r" ?\p{N}{1,2}| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
BOS = "<s>"


def train(texts, n_vocab, name):
    """A byte-level BPE of n_vocab tokens, trained on an iterator of texts (package tokenizers).

    Every byte is a token, so any text has tokens. With little text there are fewer than n_vocab.
    """
    check(n_vocab >= 257, f"--tokenizer bpe:{n_vocab}: 256 bytes and the BOS are 257 tokens")
    library = optional("tokenizers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are forked after this
    pre = library.pre_tokenizers
    model = library.Tokenizer(library.models.BPE())
    split = pre.Split(library.Regex(PATTERN), "isolated")
    bytes_only = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre.Sequence([split, bytes_only])
    trainer = library.trainers.BpeTrainer(
        vocab_size=n_vocab,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=[BOS],
        min_frequency=2,
        max_token_length=32,
        show_progress=False,
    )
    spaced = (" " + text for text in texts)  # as prefix_space has it
    model.train_from_iterator(spaced, trainer)
    made = json.loads(model.to_str())
    parts = corpus.huggingface_parts(made, "the trained tokenizer") | dict(prefix_space=True)
    return corpus.build_tokenizer(name, bos=BOS, name=name, **parts)


def choose(spec, texts, name):
    """The tokenizer that --tokenizer names, and one line about it.

    spec: "bpe:VOCAB" (trained on `texts`), a tokenizer.json, a data set or directory that holds
    one, or a name of tiktoken.
    """
    if spec.startswith("bpe:"):
        number = spec.removeprefix("bpe:")
        check(number.isdecimal(), f"--tokenizer {spec}: give a number of tokens, as in bpe:4096")
        made = train(texts, int(number), name)
        return made, f"trained on this text, {made.n_vocab:,} tokens"
    made = open_named(spec)
    return made, f"{spec}, {made.n_vocab:,} tokens"


def open_named(spec):
    """The tokenizer of a tokenizer.json, of a data set or of tiktoken."""
    if Path(spec).is_file():
        return corpus.open_tokenizer(spec)
    return corpus.tokenizer(spec)


def merge(first, second, out):
    """Joins two vocabularies and writes <out>/tokenizer.json; returns the Tokenizer."""
    line = f"--out {out} is a data set, which has its tokenizer: give another directory"
    check(not Path(out, "meta.json").exists(), line)
    one = open_named(first)
    other = open_named(second)
    both = corpus.merge_tokenizers(one, other, Path(out).name)
    both.save(make_directory(out) / "tokenizer.json")
    together = one.n_vocab + other.n_vocab
    print(
        f"{first}: {one.n_vocab:,} tokens; {second}: {other.n_vocab:,}\n"
        f"{out}: {both.n_vocab:,} tokens, {together - both.n_vocab:,} of both were duplicates or "
        f"special; all 256 bytes are tokens"
    )
    return both


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = p.add_subparsers(dest="command", required=True)
    join = commands.add_parser("merge", help="one vocabulary of two, without duplicates")
    join.add_argument("first", help="a data set, a tokenizer.json or a name of tiktoken")
    join.add_argument("second", help="the same; its new tokens follow those of the first")
    join.add_argument("--out", required=True, help="directory for tokenizer.json")
    a = p.parse_args(argv)
    for name in (a.first, a.second):
        if name.startswith("bpe:"):
            raise UserError(f"{name}: merge joins tokenizers that are there")
    merge(a.first, a.second, a.out)


if __name__ == "__main__":
    run(main)
