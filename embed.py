"""Embedders: a text becomes a vector of length 1, so that texts are found by cosine (sec. 3.1).

words            the words of a text in any script, in one Unicode form
HashEmbedder     counts words and parts of words: no download, no training
embedder(name)   that one, or any encoder of Hugging Face

An embedder has
    .encode(n texts) -> (n, dim) float32, each of length 1, or 0 if there is nothing to embed
    .fit(texts) -> an embedder that knows these texts; .state: what it has learnt, as one array
    .name: the value of --embedder; .id: names the vectors exactly: equal ids, equal vectors
Nothing here knows about indexes.
"""

import hashlib
import json
import re
import unicodedata
import zlib
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError, check, optional

# the values of --embedder; the last is not an embedder of texts but searches keys (inside.py)
KINDS = "hash, hash:DIM, bge-m3, hf:NAME, self:LAYER.HEAD"

# -- Words ------------------------------------------------------------------------------------

# Scripts written without spaces between words: letters, and the marks that belong to them.
UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ebd\u0ec0-\u0ece\u0edc-\u0edf"  # Lao
    "\u1000-\u103f\u1050-\u108f\ua9e0-\ua9ef\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17d3\u17dc\u17dd"  # Khmer
    "\u1950-\u1974\u1980-\u19c9\u1a20-\u1a7f"  # Tai Le, New Tai Lue, Tai Tham
    "\u3005-\u3007\u3021-\u302f\u3031-\u3035\u3038-\u303c"  # iteration marks, zero, numerals
    "\u3041-\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
    "\u3105-\u312f\u31a0-\u31bf\ua000-\ua48c"  # Bopomofo, Yi
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
# Invisible characters inside words: soft hyphen, joiners, directions, variation selectors
INVISIBLE = re.compile(
    "[\u00ad\u200c-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)
MARK = "".join(chr(c) for c in range(0x20000) if unicodedata.category(chr(c)).startswith("M"))
LETTERS = rf"[^\W{UNSPACED}]"  # and digits: \w of the scripts with spaces
# \w leaves combining marks out of words; by Unicode's rules a mark belongs to its letter.
WORD = re.compile(rf"{LETTERS}+(?:[{MARK}]+{LETTERS}*)*")
ASCII_WORD = re.compile(r"\w+")
RUN = re.compile(rf"[{UNSPACED}]+")
HIRAGANA = re.compile("[\u3041-\u309f]")
LETTER = re.compile(rf".[{MARK}]*")  # with its marks


def normalize(text):
    """The one form of all canonically equal texts (Unicode's NFC): o + two dots becomes one letter.

    All text that enters passes through here, so that it finds what was written in another form.
    """
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", text)


def words(text):
    """The words of a text, in lower case and in one Unicode form.

    In a script without spaces each letter counts as a word, twice, and each pair of neighbouring
    letters once. A single hiragana is grammar and no word.
    >>> words("Kyiv's MU\u0308NCHEN, 名古屋の")
    ['kyiv', 's', 'münchen', '名', '古', '屋', '名', '古', '屋', '名古', '古屋', '屋の']
    >>> words("４２ km²")
    ['42', 'km2']
    """
    if text.isascii():
        return ASCII_WORD.findall(text.casefold())
    # Unicode's caseless match: fold the case of the decomposed text, then compose. With K also wide
    # digits and narrow kana become the ordinary ones.
    text = unicodedata.normalize("NFKD", INVISIBLE.sub("", text)).casefold()
    text = unicodedata.normalize("NFKC", text)
    found = WORD.findall(text)
    for run_of_letters in RUN.findall(text):
        letters = LETTER.findall(run_of_letters)
        alone = [letter for letter in letters if not HIRAGANA.match(letter)]
        pairs = ["".join(pair) for pair in pairwise(letters)]
        found += alone + alone + pairs
    return found


def lower_words(text):
    """The words that stand somewhere in a text in small letters."""
    small = [raw for raw in ASCII_WORD.findall(text) if raw[0].islower()]
    return set(words(" ".join(small)))


def small_words(text):
    """The words that stand in a text in small letters only, so that they are hardly names. None
    where no word but the first begins with a capital: then small letters say nothing.

    >>> sorted(small_words("I wonder where Wonder Lake or Kyiv is"))
    ['is', 'or', 'where']
    >>> small_words("where is wonder lake")
    set()
    """
    raw_words = ASCII_WORD.findall(text)
    names = [raw for raw in raw_words[1:] if raw[0].isupper() and len(raw) > 1]  # not "I"
    if not names:
        return set()
    large = [raw for raw in raw_words if raw[0].isupper()]
    return lower_words(text) - set(words(" ".join(large)))


# -- Embedders --------------------------------------------------------------------------------


def digest(array):
    """16 hex digits that name the bytes of an array."""
    return hashlib.blake2b(np.ascontiguousarray(array)).hexdigest()[:16]


class HashEmbedder:
    """Hashed tf-idf of words and of their character 3- and 4-grams: no download, no training.

    A word is the signed, idf-weighted sum of its features ("<kyiv>", "<ky", "kyi", ..., "yiv>"),
    a text the normalised sum of its words; a text without words is zero. It is the same on every
    machine: CRC-32, not Python's salted hash, and an id made of integer counts, not of logarithms.
    """

    VERSION = 3  # of the rule that makes the vectors; it is part of the id
    BUCKETS = 1 << 18  # in which features are counted
    MOST = 1 << 13  # dimensions that a feature's hash can tell apart
    CACHE = 1 << 16  # words whose vectors are kept: 128 MB at 512 dimensions
    BATCH = 1024  # texts that are embedded at a time

    def __init__(self, dim=512, state=None):
        if state is None:
            state = np.zeros(self.BUCKETS + 1, "<u4")
        self.dim = dim
        self.name = f"hash:{dim}"
        # How many texts have feature 0, 1, ..., BUCKETS - 1, and how many texts there are
        self.state = state
        self.id = f"{self.name}:{self.VERSION}:{digest(state)[:12]}"
        self.idf = np.log((state[-1] + 2.0) / (state[:-1] + 1.0))
        self.known = {}  # word -> its vector

    def fit(self, texts):
        """-> a new embedder with the document frequencies: how many texts have each feature."""
        n = 0
        frequency = np.zeros(self.BUCKETS)
        counts = Counter()
        for text in texts:
            n += 1
            counts.update(set(words(text)))
            if len(counts) > 2 * self.CACHE:  # memory stays flat
                frequency += self._frequency(counts)
                counts.clear()
        frequency += self._frequency(counts)
        frequency = np.minimum(frequency, n)  # two words of one text may share a feature
        return HashEmbedder(self.dim, np.append(frequency, n).astype("<u4"))

    def _frequency(self, counts):
        hashes, n_features = self._hashes(counts)
        weights = np.repeat(list(counts.values()), n_features)
        return np.bincount(hashes % self.BUCKETS, weights, self.BUCKETS)

    @staticmethod
    def _hashes(some_words):
        """The features of words as 32-bit hashes: those of all words, one after another, and how
        many each word has. Bits 0-17 name the feature, 18-30 its dimension, 31 its sign."""
        hashes = []
        n_features = []
        for word in some_words:
            before = len(hashes)
            if RUN.match(word):
                hashes.append(zlib.crc32(word.encode()))
            else:
                marked = f"<{word}>"
                if marked.isascii():
                    marked = marked.encode()  # slices of bytes are hashed as they are
                _hash_grams(marked, hashes)
            n_features.append(len(hashes) - before)
        return np.array(hashes, np.int64), np.array(n_features, np.int64)

    def _vectors(self, some_words):
        """(n, dim) float32: the vector of each word."""
        hashes, n_features = self._hashes(some_words)
        sign = np.where(hashes >> 31, -1, 1)
        values = self.idf[hashes % self.BUCKETS] * sign
        dimension = (hashes >> 18) % self.MOST % self.dim
        row = np.repeat(np.arange(len(n_features)), n_features)
        flat = np.bincount(row * self.dim + dimension, values, len(n_features) * self.dim)
        return flat.astype(np.float32).reshape(-1, self.dim)

    def encode(self, texts):
        texts = list(texts)
        out = np.zeros((len(texts), self.dim), np.float32)
        for i in range(0, len(texts), self.BATCH):
            out[i : i + self.BATCH] = self._encode(texts[i : i + self.BATCH])
        return out

    def _encode(self, texts):
        bags = [words(text) for text in texts]
        vocabulary = dict.fromkeys(chain.from_iterable(bags))  # each word once, in order
        new = [word for word in vocabulary if word not in self.known]
        if len(self.known) + len(new) > self.CACHE:
            self.known.clear()  # the common words will be back at once
            new = list(vocabulary)
        if new:
            self.known.update(zip(new, self._vectors(new), strict=True))
        table = np.zeros((len(vocabulary), self.dim), np.float32)
        row = {}
        for i, word in enumerate(vocabulary):
            table[i] = self.known[word]
            row[word] = i
        flat = [row[word] for bag in bags for word in bag]
        starts = np.cumsum([0] + [len(bag) for bag in bags])[:-1]  # where each bag begins in flat
        if not flat:
            return np.zeros((len(texts), self.dim), np.float32)
        out = F.embedding_bag(
            torch.tensor(flat), torch.from_numpy(table), torch.from_numpy(starts), mode="sum"
        )  # (n, dim): the words of a text are added up in their order
        out = out.numpy()
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)


def _hash_grams(marked, hashes):
    """Appends the hashes of "<word>" and of its 3- and 4-grams. marked: text, or ASCII bytes.

    The "=" tells a whole word from the same letters as a gram of a longer one."""
    if isinstance(marked, bytes):
        hashes.append(zlib.crc32(b"=" + marked))
        for n in (3, 4):
            hashes += [zlib.crc32(marked[i : i + n]) for i in range(len(marked) - n + 1)]
        return
    hashes.append(zlib.crc32(("=" + marked).encode("utf-8", "replace")))
    for n in (3, 4):
        grams = [marked[i : i + n] for i in range(len(marked) - n + 1)]
        hashes += [zlib.crc32(gram.encode("utf-8", "replace")) for gram in grams]


class HuggingFaceEmbedder:
    """Any Hugging Face encoder: the normalised output feature of its first token, <cls> (3.1)."""

    def __init__(self, name):
        transformers = optional("transformers")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.model = transformers.AutoModel.from_pretrained(name).eval().to(device)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(f"--embedder hf:{name} cannot be loaded: {why}") from None
        self.dim = self.model.config.hidden_size
        self.state = np.zeros(0, "<u4")
        self.name = f"hf:{name}"
        self.id = f"{self.name}:{self.dim}:{self._weights()}"

    def _weights(self):
        """A hash of weights and vocabulary: a name may come to stand for other files."""
        digest = hashlib.blake2b()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        config = self.model.config.to_diff_dict()
        config.pop("_name_or_path", None)  # the path is in the name
        config.pop("transformers_version", None)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        if self.tokenizer.is_fast:
            digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        else:
            digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        return digest.hexdigest()[:12]

    def fit(self, texts):
        return self

    @torch.inference_mode()
    def encode(self, texts):
        texts = [normalize(text) for text in texts]
        out = torch.zeros(len(texts), self.dim)
        for i in range(0, len(texts), 64):
            part = texts[i : i + 64]
            batch = self.tokenizer(part, return_tensors="pt", padding=True, truncation=True)
            features = self.model(**batch.to(self.model.device)).last_hidden_state  # (n, m, dim)
            out[i : i + 64] = features[:, 0]
        return F.normalize(out, dim=-1).numpy()


def full_name(name):
    """The full name of an embedder, from its short one."""
    return {"hash": "hash:512", "bge-m3": "hf:BAAI/bge-m3"}.get(name, name)


def embedder(name, state=None):
    """The embedder called "hash", "hash:DIM", "hf:NAME" or "bge-m3" (the paper's), or UserError.

    state: the .state of the same embedder after .fit, from disk. An embedder is returned as it is.
    """
    if not isinstance(name, str):
        return name
    full = full_name(name)
    if full.startswith("hf:") and len(full) > 3:
        return HuggingFaceEmbedder(full[3:])
    match = re.fullmatch(r"hash:([1-9][0-9]{0,5})", full)
    check(match, f"unknown embedder {name!r}: take one of {KINDS}")
    dim = int(match[1])
    check(dim <= HashEmbedder.MOST, f"embedder {name}: at most {HashEmbedder.MOST} dimensions")
    return HashEmbedder(dim, state)
