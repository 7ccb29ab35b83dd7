"""Texts as token files: tokenizer, memmapped training tokens, references, manifest (sec. 4).

A prepared data set is a directory, made by data/<name>/prepare.py. It holds all that it needs, so
it can be moved, renamed and used from any working directory:
    meta.json           manifest: what is in it, how it was made
    tokenizer.json      byte-pair ranks, if the data set has a tokenizer of its own
    <split>.bin         tokens of a split, uint16 (uint32 for a vocabulary beyond 65,536)
    <refs>.bin, .idx    references: their tokens end to end, and N+1 offsets (int64); perhaps
                        .titles: how many tokens of each are its title (int64)
Nothing here knows what the texts are about.
"""

import base64
import binascii
import hashlib
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch

from common import UserError, check, command, optional, read_json, replace_file, write_json

# -- The tokenizer ----------------------------------------------------------------------------


class Tokenizer:
    """A tiktoken encoding with the few things that a decoder needs around it.

    bos: id of the token that every text begins with. header: the modified BOS of references, the
    tokens of "<s>Reference:" (sec. 3.2). n_vocab: ids are below it. prefix_space: whether a space
    goes before the first word, as in Llama, so that a name is the same tokens wherever it stands.
    id: names all that decides which tokens a text becomes; it is stored wherever tokens are.
    """

    def __init__(self, encoding, bos, name, prefix_space=False, n_vocab=None, cuts=(), added=()):
        """n_vocab: if the encoding has ids that the model lacks (bytes without a token). cuts:
        patterns that cut a text one after the other before that of the encoding does. added: texts
        that are always one token, each in the encoding's special tokens."""
        self.encoding = encoding
        self.bos = bos
        self.name = name
        self.prefix_space = prefix_space
        self.cuts = tuple(cuts)
        self.added = {text: encoding._special_tokens[text] for text in added}
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(longest_first)})")
        self._cuts = [optional("regex").compile(cut) for cut in cuts]
        self.n_vocab = n_vocab or encoding.n_vocab
        ids = {*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()}
        self.no_token = {i for i in range(self.n_vocab) if i not in ids}  # cl100k_base has 11
        self.decoded = set(range(self.n_vocab)) - self.no_token - {bos}  # ids that become text
        self.id = f"{name}:{self._digest()}"
        self.header = [bos, *encoding.encode_ordinary("Reference:")]

    def _digest(self):
        """Eight hex digits of the ranks, the pattern, the special tokens and our own rules."""
        rules = ("NFC", self.encoding._pat_str, self.prefix_space, self.bos, self.n_vocab)
        if self.cuts or self.added:
            rules += (self.cuts, sorted(self.added))
        digest = hashlib.sha256(repr(rules).encode())
        for token, i in sorted(self.encoding._mergeable_ranks.items()):
            digest.update(b"%d %d %s" % (i, len(token), token))
        for token, i in sorted(self.encoding._special_tokens.items()):
            digest.update(repr((i, token)).encode())
        return digest.hexdigest()[:8]

    def encode(self, text):
        """Token ids of a text, without BOS.

        Unicode has several spellings of one letter (e with an accent, or e and then the accent).
        Here, where every text enters, they become one (NFC): equal texts are equal tokens.
        """
        text = unicodedata.normalize("NFC", text)
        if self.prefix_space and text and not text[0].isspace():
            text = " " + text
        ids = []
        for piece in self._pieces(text):
            if piece in self.added:
                ids.append(self.added[piece])
            else:
                ids += self.encoding.encode_ordinary(piece)
        if self.encoding.n_vocab > self.n_vocab:
            ids = [i for i in ids if i < self.n_vocab]
        return ids

    def _pieces(self, text):
        """The text in pieces between which nothing is merged: at `added`, then at each of `cuts`,
        where what a pattern finds and what lies between are pieces alike."""
        pieces = self._added.split(text) if self.added else [text]
        for cut in self._cuts:
            smaller = []
            for piece in pieces:
                at = 0
                if piece not in self.added:
                    for match in cut.finditer(piece):
                        smaller += [piece[at : match.start()], match[0]]
                        at = match.end()
                smaller.append(piece[at:])
            pieces = smaller
        return pieces

    def decode(self, ids):
        """The text of token ids, without BOS, -1 padding and ids that are no token's."""
        kept = [i for i in map(int, ids) if i in self.decoded]
        return self.encoding.decode(kept, errors="replace")

    def save(self, path):
        """Writes what `tokenizer` reads: a tokenizer.json of ours."""
        ranks = [None] * self.n_vocab  # None: no token of text
        for token, i in self.encoding._mergeable_ranks.items():
            if i < self.n_vocab:
                ranks[i] = base64.b64encode(token).decode()
        special = self.encoding._special_tokens
        bos = next(token for token, i in special.items() if i == self.bos)
        made = dict(name=self.name, pattern=self.encoding._pat_str, prefix_space=self.prefix_space)
        if self.cuts or self.added:
            made |= dict(cuts=list(self.cuts), added=list(self.added))
        write_json(path, made | dict(special=special, bos=bos, ranks=ranks))


def tokenizer(name):
    """The tokenizer of a prepared data set (its directory), or one of tiktoken's by name.

    A string without a slash that names an encoding of tiktoken is that encoding, even if there is
    a directory called so: write ./gpt2 for the directory.
    >>> t = tokenizer("data/cities")
    >>> t.decode(t.encode("Kyiv has 2797553 people."))
    ' Kyiv has 2797553 people.'
    """
    if isinstance(name, str) and name in optional("tiktoken").list_encoding_names():
        return _from_tiktoken(name)
    path = Path(name, "tokenizer.json")
    if path.exists():
        found = open_tokenizer(path)
        _check_made_with(name, found.id)
        return found
    # a data set may use tiktoken's or another data set's: its manifest names it
    if path.parent.is_dir() or os.sep in str(name):
        used = manifest(name, dict(tokenizer=str))["tokenizer"]
        if used in optional("tiktoken").list_encoding_names():
            return _from_tiktoken(used)
        # else a directory, seen from this one: "." (its own, which is missing) or another data set
        path = _present(Path(name, used, "tokenizer.json"))
        found = open_tokenizer(path)
        _check_made_with(name, found.id)
        return found
    listed = ", ".join(optional("tiktoken").list_encoding_names())
    raise UserError(f"unknown tokenizer {name!r}: give a data directory, or one of {listed}")


def _check_made_with(folder, tokenizer_id):
    """UserError if a data set was made with another tokenizer than the one that lies there now."""
    if Path(folder, "meta.json").exists():
        cure = _cure(folder)
        made_with = read_json(Path(folder, "meta.json"), {}, cure).get("tokenizer_id", tokenizer_id)
        line = f"{folder}: its tokenizer is {tokenizer_id}, but the data set was made with"
        check(made_with == tokenizer_id, f"{line} {made_with}: bring that back, or {cure}")


def _from_tiktoken(name):
    """An encoding of tiktoken, which fetches its file at first use."""
    try:
        encoding = optional("tiktoken").get_encoding(name)
    except Exception as error:  # whatever its HTTP client raises
        line = f"tokenizer {name!r} could not be fetched ({type(error).__name__})"
        raise UserError(f"{line}: it needs the network once, or TIKTOKEN_CACHE_DIR") from error
    return Tokenizer(encoding, encoding.eot_token, name)


def open_tokenizer(path):
    """A tokenizer.json, ours (what `Tokenizer.save` writes) or Hugging Face's.

    Ours: name, pattern (how texts are cut into pieces), prefix_space, ranks (token i in base64,
    null where id i is no token of text), special {text: id} and bos, one of these texts; perhaps
    cuts and added (see Tokenizer).
    """
    cure = "take it again from where it came"
    made = read_json(path, {}, cure)
    if "ranks" not in made and "model" in made:
        return from_huggingface(path)
    made = read_json(path, dict(name=str, pattern=str, prefix_space=bool, ranks=list), cure)
    ranks = {}
    for i, token in enumerate(made["ranks"]):
        if token is None:  # an id that is a special token, or none
            continue
        try:
            ranks[base64.b64decode(token, validate=True)] = i
        except (binascii.Error, TypeError, ValueError):
            raise UserError(f"{path} is damaged: rank {i} is no base64: {cure}") from None
    special = made.get("special", {"<s>": len(made["ranks"])})
    bos = made.get("bos", "<s>")
    valid = isinstance(special, dict) and all(_is_id(i) for i in special.values())
    valid = valid and isinstance(bos, str) and bos in special
    check(valid, f"{path} is damaged: its special tokens: {cure}")
    more = {}
    for key in ("cuts", "added"):
        more[key] = made.get(key, [])
        valid = isinstance(more[key], list) and all(isinstance(text, str) for text in more[key])
        check(valid, f"{path} is damaged: {key}: {cure}")
    check(set(more["added"]) <= special.keys(), f"{path} is damaged: added: {cure}")
    return build_tokenizer(
        path, ranks, made["pattern"], special, bos, made["name"], made["prefix_space"], **more
    )


def _is_id(i):
    """Whether a value read from JSON can be a token's id; True is an int to Python."""
    return type(i) is int and i >= 0


def build_tokenizer(path, ranks, pattern, special, bos, name, prefix_space, cuts=(), added=()):
    """A Tokenizer of {token: id}, after the checks without which tiktoken dies in Rust.

    path: what the errors name. special: {text: id}, one of which is the BOS. cuts, added: see
    Tokenizer.
    """
    # what a file can hold and tiktoken cannot use
    ids = [*ranks.values(), *special.values()]
    check(ranks, f"{path} is damaged: there is no token in it")
    check(b"" not in ranks, f"{path} is damaged: a token of no bytes")
    check(len(ids) == len(set(ids)), f"{path} is damaged: two of its tokens have one id")
    n_vocab = max(ids, default=0) + 1
    check(n_vocab <= 1 << 24, f"{path} is damaged: a token with the id {n_vocab - 1}")
    # Bytes without a token (some are in no UTF-8) get ids beyond the vocabulary: encode() drops
    # them, as Hugging Face does.
    ranks = dict(ranks)
    missing = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
    for i, byte in enumerate(missing):
        ranks[byte] = n_vocab + i
    try:
        encoding = optional("tiktoken").Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        # tiktoken's own regular expressions
        pieces = [optional("regex").findall(each, "Aa\n1. ") for each in (pattern, *cuts)]
    except Exception as error:  # both have errors of their own
        why = str(error).splitlines()[0]
        raise UserError(f"{path}: tiktoken cannot use its pattern ({why})") from None
    matches = any("" in found for found in pieces)
    check(not matches, f"{path}: its pattern matches the empty text")
    check("" not in added, f"{path} is damaged: a token of no bytes")
    return Tokenizer(encoding, special[bos], name, prefix_space, n_vocab, cuts, added)


# -- Other people's vocabularies --------------------------------------------------------------

# how GPT-2 cuts a text into pieces, inside which tokens are merged
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same, after each digit has been set apart: the spaces before a digit are a piece of their own.
# (`cuts` can say that, too; but a pattern is in the id of tokenizers, and models name that.)
DIGITS_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
KINDS = "give a byte-level BPE tokenizer.json, as those of GPT-2, Llama 3, Qwen or SmolLM"
# a space before the first word, as convert.py writes it
FIRST_SPACE = dict(type="Metaspace", replacement=" ", prepend_scheme="first", split=False)
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<|endoftext|>", "<bos>", "[BOS]", "<|im_start|>")


def from_huggingface(path, bos=None):
    """A byte-level BPE tokenizer.json of Hugging Face as a Tokenizer: the same tokens (4.3).

    bos: the special token with which a text begins; None: the first of BOS_NAMES that it has.
    Its texts are brought to NFC first, as all of ours. UserError for a tokenizer of another kind.
    """
    made = read_json(path, {}, KINDS)
    try:
        parts = huggingface_parts(made, path)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # of another shape
        raise UserError(f"{path} is damaged ({error!r}): {KINDS}") from None
    special = parts["special"]
    if bos is None:
        bos = next((name for name in BOS_NAMES if name in special), None)
    check(bos in special, f"{path}: none of its special tokens is the BOS {bos or BOS_NAMES}")
    parts["added"] = [text for text in parts["added"] if text != bos]
    name = Path(path).resolve().parent.name
    return build_tokenizer(path, bos=bos, name=name, **parts)


def huggingface_parts(made, path):
    """What build_tokenizer takes, as a dict, of the content of a tokenizer.json; path: its name.

    tiktoken merges the pair whose union has the lowest id. That is Hugging Face's list of merges
    if ids rise along the list, which is checked.
    """
    model = made.get("model")
    is_bpe = isinstance(model, dict) and model.get("type") in ("BPE", None)
    vocab = model.get("vocab") if is_bpe else None
    merges = model.get("merges") if is_bpe else None
    check(isinstance(vocab, dict) and isinstance(merges, list), f"{path}: not a BPE: {KINDS}")
    cuts, pattern, prefix_space = _pattern_of(made, path)
    special = {}
    added = []
    for token in made.get("added_tokens") or []:
        special[token["content"]] = token["id"]
        if not token.get("special", True):  # a text that is always one token, as a run of spaces
            added.append(token["content"])
            flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
            line = f"{path}: its token {token['content']!r} has {', '.join(flags)}, unknown here"
            check(not flags and not prefix_space, line)
    for token, i in [*vocab.items(), *special.items()]:
        check(isinstance(token, str) and _is_id(i), f"{path}: {token!r} has the id {i!r}: {KINDS}")

    # vocab spells each byte as a printable letter; only what merges reach is a token
    byte_of = bytes_of_letters()
    reached = list(byte_of)  # single bytes
    last = -1
    for merge in merges:  # "a b", or ["a", "b"]
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        check(token in vocab, f"{path}: the merge {token!r} is not in its vocabulary: {KINDS}")
        if token not in special:
            check(vocab[token] > last, f"{path}: its ids do not follow its merges, at {token!r}")
            last = vocab[token]
            reached.append(token)
    if model.get("ignore_merges"):  # a whole piece in the vocabulary is a token, merged or not
        reached = [*reached, *vocab]
    ranks = {}
    for token in reached:
        if token in vocab and token not in special:
            check(set(token) <= byte_of.keys(), f"{path}: {token!r} is no string of bytes: {KINDS}")
            ranks[bytes(byte_of[letter] for letter in token)] = vocab[token]
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    check(missing < 128, f"{path}: no token for {missing} bytes: not a byte-level BPE: {KINDS}")
    how = dict(pattern=pattern, prefix_space=prefix_space, cuts=cuts, added=added)
    return dict(ranks=ranks, special=special, **how)


def _pattern_of(made, path):
    """(cuts, pattern, prefix_space): how a Hugging Face tokenizer cuts a text into pieces."""
    normalizer = made.get("normalizer") or dict(type="NFC")
    line = f"{path}: it changes texts first ({normalizer}): {KINDS}"
    check(normalizer.get("type") == "NFC", line)
    step = made.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    prefix_space = FIRST_SPACE in steps
    steps = [step for step in steps if step != FIRST_SPACE]
    kinds = [step.get("type") for step in steps]
    listed = ", ".join(map(str, kinds))
    unknown = f"{path}: it cuts texts by {listed} in a way unknown here: {KINDS}"
    check("ByteLevel" in kinds, f"{path}: not byte-level: {KINDS}")
    # its last step turns pieces into bytes; the steps before it cut them
    check(kinds[-1] == "ByteLevel", unknown)
    cuts = [_cut_of(step) for step in steps[:-1]]
    check(None not in cuts, unknown)
    each_space = bool(steps[-1].get("add_prefix_space"))
    check(not each_space or not cuts, unknown)  # it would put a space before every piece
    prefix_space = prefix_space or each_space
    if steps[-1].get("use_regex", True):
        if cuts == [r"\p{N}"]:
            return [], DIGITS_PATTERN, prefix_space
        return cuts, GPT2_PATTERN, prefix_space
    check(cuts, unknown)
    # a pattern of its own, as Llama 3 and Qwen have; DeepSeek has several
    return cuts[:-1], _whole(cuts[-1]), prefix_space


def _cut_of(step):
    """The pattern of a step of Hugging Face that cuts texts; None if it is of another kind."""
    kind = step.get("type")
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    behavior = step.get("behavior")
    if kind == "Punctuation" and behavior in ("Isolated", "Contiguous"):
        return r"[\p{P}$+<=>^`|~]" + ("+" if behavior == "Contiguous" else "")
    if kind == "Split" and behavior == "Isolated" and not step.get("invert"):
        pattern = step.get("pattern", {})
        text = pattern.get("Regex")
        if text is None and isinstance(pattern.get("String"), str):
            text = re.escape(pattern["String"])
        if isinstance(text, str):
            return text
    return None


def _whole(pattern):
    """The pattern, made to match all of a text: for Hugging Face what lies between two matches is a
    piece, too, and for tiktoken it is lost."""
    try:
        matches = optional("regex").compile(pattern).fullmatch
    except Exception:  # the library has errors of its own; build_tokenizer says so
        return pattern
    letters = map(chr, [*range(0x3000), 0x4E00, 0xAC00, 0xE000, 0xFFFD, 0x1F600])
    if all(matches(letter) for letter in letters):
        return pattern
    return rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+"


def bytes_of_letters():
    """{letter: byte} of GPT-2's vocabulary files: printable bytes are themselves in Latin-1, the
    others are the letters from 256 on."""
    letters = {}
    beyond = 256
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        if printable:
            letters[chr(byte)] = byte
        else:
            letters[chr(beyond)] = byte
            beyond += 1
    return letters


def merge_tokenizers(first, second, name):
    """One vocabulary of two, each token once (4.3: LLaMA2's and a Chinese one became 60,299).

    The tokens of `first` in their order, then the new ones of `second` in theirs, then the BOS.
    So a text whose script the second one lacks keeps its tokens of the first, and every byte is one
    in both. Texts are cut by the pattern of `first`.
    """
    ranks = {}
    for tokenizer in (first, second):
        listed = tokenizer.encoding._mergeable_ranks
        for token in sorted(listed, key=listed.get):
            if token not in ranks:
                ranks[token] = len(ranks)
    special = {"<s>": len(ranks)}
    pattern = first.encoding._pat_str
    how = dict(prefix_space=first.prefix_space, cuts=first.cuts)
    return build_tokenizer(name, ranks, pattern, special, "<s>", name, **how)


# -- Sentences --------------------------------------------------------------------------------

# What ends a sentence if a space follows: a full stop may also stand in a number, "։" in a time
SPACED_ENDS = ".!?…։"
# What ends one with or without: of Chinese, Hindi, Arabic, Urdu, Amharic, Burmese, Khmer
OTHER_ENDS = "。！？।॥؟۔።፧။។"
# at most 99 of them: a long run of dots would be tried from each of its dots to its end
SPACED_END = rf"[{SPACED_ENDS}]{{1,99}}[\"'”’)\]]*(?=\s)"
OTHER_END = rf"(?:[{OTHER_ENDS}]|．(?!\d))+[”’」』）]*"
SENTENCE = re.compile(rf"[^\n]*?(?:{SPACED_END}|{OTHER_END}|\n+|$)")


def sentences(text):
    """The sentences of a text; joined they are the text. A line end ends one, too.

    >>> sentences('It has 2.8 million people. "Many!" Indeed')
    ['It has 2.8 million people.', ' "Many!"', ' Indeed']
    >>> sentences("北京是首都。它很大！"), sentences("दिल्ली राजधानी है। वह बड़ी है।")
    (['北京是首都。', '它很大！'], ['दिल्ली राजधानी है।', ' वह बड़ी है।'])
    """
    return [found for found in SENTENCE.findall(text) if found]


def fit(text, tokenizer, ref_len):
    """Cuts a text into references of at most ref_len tokens, a list each (sec. 4.4): between
    sentences if it can, else between words or letters."""
    pieces = []
    held = ""
    for sentence in sentences(text):
        if held and len(tokenizer.encode((held + sentence).strip())) > ref_len:
            pieces.append(held)
            held = ""
        held = (held + sentence).lstrip()
        while len(held) > 16 * ref_len or len(tokenizer.encode(held.strip())) > ref_len:
            piece = fitting(held, tokenizer, ref_len)  # of one sentence that is too long
            pieces.append(piece)
            held = held[len(piece) :].lstrip()
    pieces.append(held)
    return [tokenizer.encode(piece.strip()) for piece in pieces if piece.strip()]


def fitting(text, tokenizer, budget):
    """The longest beginning of a text that has at most `budget` tokens, cut at a space in its
    second half if there is one. Found by bisection over its characters: none is cut in two."""
    low = min(1, len(text))
    high = min(len(text), 16 * budget)
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokenizer.encode(text[:middle])) <= budget:
            low = middle
        else:
            high = middle - 1
    if low == len(text):
        return text
    at = text.rfind(" ", low // 2, low)
    return text[:at] if at > 0 else text[:low]


# -- Files of a data set ----------------------------------------------------------------------


def _cure(folder):
    """The command that makes what a data set lacks."""
    folder = Path(folder)
    if Path(folder, "prepare.py").exists():
        return "run " + command(folder / "prepare.py")
    try:
        return "run " + read_json(folder / "meta.json", dict(command=str), "")["command"]
    except UserError:
        made = command("data/text/prepare.py", "TEXTS", "--out", folder)
        return f"run {made}, or give another data set"


def _present(path):
    """A file of a prepared data set: its path, or UserError with the command to run."""
    path = Path(path)
    if not path.exists():
        cure = _cure(path.parent)
        if cure.endswith("/prepare.py") and path.stem in ("train", "explicit", "train_refs"):
            cure += " --train"
        raise UserError(f"{path} is missing: {cure}")
    return path


def manifest(data_dir, schema=None):
    """The meta.json of a prepared data set, as a dict: n_vocab and what else `schema` asks for."""
    path = Path(data_dir, "meta.json")
    meta = read_json(path, dict(n_vocab=int) | (schema or {}), _cure(data_dir))
    n_vocab = meta["n_vocab"]
    check(0 < n_vocab < 1 << 32, f"{path} is damaged: n_vocab {n_vocab}: {_cure(data_dir)}")
    return meta


def dtype_for(n_vocab):
    """The integers that hold the ids of a vocabulary, on disk.

    >>> dtype_for(65_536).itemsize, dtype_for(65_537).itemsize
    (2, 4)
    """
    return np.dtype("<u2") if n_vocab <= 65536 else np.dtype("<u4")


CHECKED = 1 << 28  # tokens of a file whose ids are looked at when it is opened (half a second)


def open_tokens(data_dir, split):
    """The tokens of a split, as a read-only memmap. UserError if the file is cut off or damaged."""
    path = Path(data_dir) / f"{split}.bin"
    if not path.exists():
        _check_made_without(data_dir, split)
    path = _present(path)
    meta = manifest(data_dir)
    tokens = _map_tokens(path, meta["n_vocab"])
    # the manifest knows how long the file was when it was made
    splits = meta.get("splits")
    length = splits.get(split) if isinstance(splits, dict) else None
    valid = length in (None, len(tokens))
    check(valid, f"{path} has {len(tokens):,} tokens, meta.json {length}: {_cure(data_dir)}")
    return tokens


def _check_made_without(data_dir, split):
    """UserError if a data set of data/text has no text for a split: to make it again will not help,
    unless there is more text."""
    if Path(data_dir, "meta.json").exists():
        meta = read_json(Path(data_dir, "meta.json"), {}, _cure(data_dir))
        complete = "prepared" in meta and split not in meta.get("splits", {})
        line = f"{data_dir} has no split {split}, only {', '.join(meta.get('splits', {}))}"
        check(not complete, f"{line}: name one of these, or prepare more text")


def _map_tokens(path, n_vocab):
    """A .bin file as a memmap of ids below n_vocab."""
    cure = _cure(path.parent)
    dtype = dtype_for(n_vocab)
    size = path.stat().st_size
    check(size, f"{path} is empty: {cure}")
    check(size % dtype.itemsize == 0, f"{path} is cut off: {size:,} bytes are no ids: {cure}")
    try:
        tokens = np.memmap(path, dtype, mode="r")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    highest = int(tokens[:CHECKED].max())
    check(highest < n_vocab, f"{path}: id {highest} of a vocabulary of {n_vocab:,}: {cure}")
    return tokens


def write_tokens(path, tokens, n_vocab):
    """Writes ids below n_vocab as a .bin file."""
    data = checked_ids(path, tokens, n_vocab).tobytes()
    replace_file(path, lambda file: file.write(data))


def checked_ids(path, tokens, n_vocab):
    """Token ids in the dtype of their vocabulary; UserError, before anything is written, for what
    is no id in it. path: only for the message."""
    tokens = np.asarray(tokens)
    if tokens.size:  # an empty list is float64
        check(tokens.dtype.kind in "iu", f"{path}: token ids are integers, not {tokens.dtype}")
        low = int(tokens.min())
        high = int(tokens.max())
        wrong = low if low < 0 else high
        check(low >= 0 and high < n_vocab, f"{path}: id {wrong}; ids are 0 to {n_vocab - 1}")
    return tokens.astype(dtype_for(n_vocab))


# -- References -------------------------------------------------------------------------------


class References:
    """The knowledge base as text: N token sequences of at most ref_len tokens (sec. 4.4).

    Row i of a memory bank is the memory of reference i.
    """

    def __init__(self, path, tokens, offsets, n_vocab):
        self.path = path
        self.tokens = tokens  # (all tokens,)
        self.offsets = offsets  # (N + 1,)
        self.n_vocab = n_vocab
        self.titles = None  # (N,) once `body` needs them

    @staticmethod
    def create(path, sequences, n_vocab, documents=None):
        """Writes <path>.bin and <path>.idx. Refuses an empty list and empty references.

        documents: of how many references, one after the other, each document consists; all are
        written to <path>.documents, for Remark 3.2 (write.py --whole_documents)."""
        check(len(sequences), f"{path}: no references to write")
        lengths = np.array([len(s) for s in sequences])
        check(lengths.all(), f"{path}: reference {lengths.argmin()} is empty")
        tokens = np.concatenate([checked_ids(path, s, n_vocab) for s in sequences])
        offsets = np.zeros(len(lengths) + 1, "<i8")
        offsets[1:] = lengths.cumsum()
        for kind in ("documents", "titles"):
            Path(f"{path}.{kind}").unlink(missing_ok=True)  # it told of other references
        write_tokens(f"{path}.bin", tokens, n_vocab)
        replace_file(f"{path}.idx", lambda file: file.write(offsets.tobytes()))
        if documents is not None:
            counts = np.array(documents, "<i8")
            replace_file(f"{path}.documents", lambda file: file.write(counts.tobytes()))
        return References.open(path, n_vocab)

    @staticmethod
    def open(path, n_vocab=None):
        """path: "<data dir>/<name>". n_vocab is read from the data set's manifest."""
        text = _present(Path(f"{path}.bin"))
        index = _present(Path(f"{path}.idx"))
        n_vocab = n_vocab or manifest(text.parent)["n_vocab"]
        tokens = _map_tokens(text, n_vocab)
        try:
            offsets = np.fromfile(index, "<i8")
        except OSError as error:
            raise UserError(f"{index} cannot be read: {error.strerror}") from None
        valid = index.stat().st_size % 8 == 0 and len(offsets) > 1 and offsets[0] == 0
        # tokens beyond the last offset are what a kill left of an append
        valid = valid and offsets[-1] <= len(tokens) and bool((np.diff(offsets) > 0).all())
        check(valid, f"{index} does not fit {text}: one of them is cut off: {_cure(text.parent)}")
        return References(Path(path), np.asarray(tokens[: offsets[-1]]), offsets, n_vocab)

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        """The tokens of reference i, (n,) int64. IndexError for -1, too: it means none."""
        if not 0 <= i < len(self):
            raise IndexError(f"reference {i}; {self.path} has {len(self)}")
        return self.tokens[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)

    def body(self, i):
        """Reference i without its title, if the data set says how long that is: (n,) int64, n > 0.

        A reference of data/text is "Title: text". The title counts neither for nor against its
        being a copy of what a window says, eq. (3.3): a window has it once, or not at all."""
        if self.titles is None:
            self.titles = self._read_titles()
        return self[i][self.titles[i] :]

    def _read_titles(self):
        """The length of each reference's title (N,); 0 where there is no file of them."""
        file = Path(f"{self.path}.titles")
        if not file.exists():
            return np.zeros(len(self), np.int64)
        titles = np.fromfile(file, "<i8")
        fits = len(titles) == len(self)
        fits = fits and (titles >= 0).all() and (titles < np.diff(self.offsets)).all()
        check(fits, f"{file} does not fit {self.path}.idx: {_cure(file.parent)}")
        return titles

    def batch(self, ids, width=None):
        """(n, width) int64 on the CPU, -1 = padding on the right; at least as wide as `width`."""
        rows = [torch.from_numpy(self[int(i)]) for i in ids]
        width = max([width or 0, *map(len, rows)])
        out = torch.full((len(rows), width), -1)  # (n, width)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out

    def places(self):
        """How many pieces of its document stand before each reference, (N,) int64. UserError where
        the data set does not say which references are pieces of one document."""
        file = Path(f"{self.path}.documents")
        cure = "drop --whole_documents, or prepare its texts with data/text/prepare.py"
        check(file.exists(), f"{file} is missing, its documents are not known: {cure}")
        counts = np.fromfile(file, "<i8")
        valid = counts.sum() == len(self) and (counts > 0).all()
        check(valid, f"{file} does not fit {self.path}.idx: {_cure(file.parent)}")
        begin = np.repeat(counts.cumsum() - counts, counts)  # (N,): the first piece's row
        return np.arange(len(self)) - begin

    @property
    def hash(self):
        """Names the references exactly: their tokens and where each begins."""
        digest = hashlib.sha256(self.offsets)
        digest.update(self.tokens)  # as it lies in the file, without a copy
        return digest.hexdigest()[:16]

    def append(self, sequence):
        """Adds a reference; returns its id. Tokens go first: a kill leaves some no offset names."""
        return self.replace(len(self), sequence)

    def replace(self, i, sequence):
        """Sets reference i (or, with i = N, appends). The files are written beside and renamed."""
        if not 0 <= i <= len(self):
            raise IndexError(f"reference {i}; {self.path} has {len(self)}")
        rows = np.split(self.tokens, self.offsets[1:-1])
        rows[i : i + 1] = [sequence]
        new = References.create(self.path, rows, self.n_vocab)
        self.tokens = new.tokens
        self.offsets = new.offsets
        self.titles = None
        return i
