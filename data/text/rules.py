"""Which documents are fit for training: the filters of section 4.2.

Rules      texts that are source code of pages, random numbers or shards, by simple counts
digest_of  a hash that copies of a text have in common
shingles   what MinHash compares, for near-duplicates
Scorer     a small model of "quality", trained by quality.py
"""

import hashlib
import re
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from common import UserError, check, replace_file
from corpus import OTHER_ENDS

# Letters of scripts that put no spaces between words: Thai, Lao, Myanmar, Khmer; kana; Han.
NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
# marks belong to their letter (Hindi's vowels are marks); Python's \w does not know them
MARKS = "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c))[0] == "M")
WORD = re.compile(rf"[{NO_SPACES}]{{1,2}}|(?:[^\W{NO_SPACES}]|[{MARKS}])+")
ASCII_WORD = re.compile(r"\w+", re.ASCII)  # the same in a text of ASCII only, but faster
UNSPACED = re.compile(f"[{NO_SPACES}]")
LETTERS = re.compile(rf"(?:[^\W\d_]|[{MARKS}])+")


def words(text):
    """The words of a text; where a script has no spaces, pairs of letters stand for words.

    >>> words("Kyiv's 2 cafés.") , words("北京是首都")
    (['Kyiv', 's', '2', 'cafés'], ['北京', '是首', '都'])
    """
    return (ASCII_WORD if text.isascii() else WORD).findall(text)


NO_ASCII_LETTER = bytes(c for c in range(128) if not chr(c).isalpha())


def n_letters(text):
    """How many letters, their marks included."""
    if text.isascii():
        return len(text.encode().translate(None, NO_ASCII_LETTER))
    return len("".join(LETTERS.findall(text)))


@dataclass
class Rules:
    """The rules of section 4.2 with their limits; 0 switches a rule off."""

    min_words: int = 50  # fewer words than this
    max_word_length: float = 10.0  # mean length of the words above this (scripts with spaces)
    max_non_alphabetic: float = 0.7  # share of the characters, spaces aside, that are no letters
    max_unique: float = 0.95  # distinct words over words, in texts of 100 words or more; in scripts
    # without spaces letters over letters: of 200 Chinese pairs nearly all are distinct
    min_entropy: float = 3.0  # bits a word: 3 is what eight words in turn have
    max_broken: float = 0.1  # share of the characters that were no UTF-8

    def broken_rule(self, text, broken=0):
        """The name of the first rule that a text breaks, or None."""
        if self.max_broken and broken > self.max_broken * len(text):
            return "max_broken"
        found = words(text)
        n = len(found)
        if n < max(1, self.min_words):  # a text without any word is none, whatever the rules
            return "min_words"
        spaced = found
        if not text.isascii():
            spaced = [word for word in found if not UNSPACED.match(word)]
        if self.max_word_length and len(spaced) > n / 2:
            if sum(map(len, spaced)) / len(spaced) > self.max_word_length:
                return "max_word_length"
        if self.max_non_alphabetic:
            characters = len("".join(text.split()))
            if characters - n_letters(text) > self.max_non_alphabetic * characters:
                return "max_non_alphabetic"
        counts = Counter(map(str.casefold, found))
        if self.max_unique and self._too_unique(counts):
            return "max_unique"
        # entropy of unigrams: - sum over words of p log2 p
        p = np.array(list(counts.values())) / n
        if self.min_entropy and n >= 2**self.min_entropy:
            if -(p * np.log2(p)).sum() < self.min_entropy:
                return "min_entropy"
        return None

    def _too_unique(self, counts):
        """Whether hardly any word occurs twice. counts: how often each does."""
        distinct = set()
        total = 0
        for word, n in counts.items():
            if UNSPACED.match(word):
                distinct.update(word)
                total += n * len(word)
            else:
                distinct.add(word)
                total += n
        return total >= 100 and len(distinct) > self.max_unique * total


# -- Duplicates -------------------------------------------------------------------------------


def digest_of(text):
    """64 bits that name a text; upper case and spaces do not count."""
    plain = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    data = plain.encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def shingles(text, n=3):
    """The runs of n words of a text, as bytes: near-duplicates share most of them."""
    found = words(text.casefold())
    runs = {" ".join(found[i : i + n]) for i in range(max(1, len(found) - n + 1))}
    return [run.encode("utf-8", "replace") for run in sorted(runs)]


# -- Quality ----------------------------------------------------------------------------------

BUCKETS = 1 << 16


def features(text):
    """{bucket: weight} of a text, of length 1: hashed words and pairs of words, and how it looks.

    Words count by the logarithm of how often they occur, so that long texts are not better.
    """
    found = [word.casefold() for word in words(text)[:2000]]
    counts = Counter(found)
    counts.update(f"{a} {b}" for a, b in zip(found, found[1:], strict=False))
    n = max(1, len(found))
    weights = Counter()
    for feature, count in counts.items():
        bucket = zlib.crc32(feature.encode("utf-8", "replace")) % BUCKETS
        weights[bucket] += np.log1p(count)
    norm = np.sqrt(sum(weight * weight for weight in weights.values())) or 1.0
    row = {bucket: weight / norm for bucket, weight in weights.items()}
    # how it looks: word length, unique words, digits, sentence ends, length
    looks = [
        sum(map(len, found)) / n / 10,
        len(set(found)) / n,
        sum(map(str.isdigit, text)) / max(1, len(text)),
        sum(map(text.count, ".!?" + OTHER_ENDS)) / n,
        np.log(n) / 10,
    ]
    for i, value in enumerate(looks):
        row[BUCKETS + i] = value
    return row


def matrix(texts):
    """Features of n texts as (row, column, value) arrays: most of (n, BUCKETS + 5) is zero."""
    rows, columns, values = [], [], []
    for i, text in enumerate(texts):
        for bucket, value in features(text).items():
            rows.append(i)
            columns.append(bucket)
            values.append(value)
    return np.array(rows), np.array(columns), np.array(values)


class Scorer:
    """quality = bias + features . weights, fitted to grades from 0 to 5 by ridge regression.

    (The paper fine-tunes a BERT of 14 M parameters; this one needs no download and scores
    2.4 MB of text a second on one core.)
    """

    def __init__(self, weights, bias, label):
        self.weights = weights  # (BUCKETS + 5,)
        self.bias = bias
        self.label = label  # which grades it was trained on

    @staticmethod
    def train(texts, grades, label, ridge=1.0, steps=100):
        """Minimises |X w + b - grades|^2 + ridge |w|^2 by conjugate gradients.

        The matrix X^T X + ridge is never made: each step multiplies by X and by X^T.
        """
        rows, columns, values = matrix(texts)
        grades = np.asarray(grades, float)
        bias = grades.mean()
        width = BUCKETS + 5

        def multiply(w):  # (X^T X + ridge) w
            along = np.bincount(rows, values * w[columns], len(texts))  # X w: (n,)
            return np.bincount(columns, values * along[rows], width) + ridge * w

        weights = np.zeros(width)
        residual = np.bincount(columns, values * (grades - bias)[rows], width)
        direction = residual.copy()
        error = residual @ residual
        for _ in range(steps):
            if error < 1e-12:
                break
            step = multiply(direction)
            alpha = error / (direction @ step)
            weights += alpha * direction
            residual -= alpha * step
            before = error
            error = residual @ residual
            direction = residual + error / before * direction
        return Scorer(weights.astype(np.float32), float(bias), label)

    def score(self, text):
        """How good a text is, about 0 to 5."""
        total = self.bias
        for bucket, value in features(text).items():
            total += self.weights[bucket] * value
        return float(total)

    def save(self, path):
        arrays = dict(weights=self.weights, bias=self.bias, label=self.label)
        replace_file(path, lambda file: np.savez_compressed(file, **arrays))

    @staticmethod
    def open(path):
        cure = "train it with python data/text/quality.py"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                weights = arrays["weights"]
                scorer = Scorer(weights, float(arrays["bias"]), str(arrays["label"]))
        except Exception as error:  # zip, zlib and NumPy each have errors of their own
            raise UserError(f"{path}: no scorer ({type(error).__name__}): {cure}") from None
        fits = weights.shape == (BUCKETS + 5,) and np.isfinite(weights).all()
        check(fits, f"{path}: no scorer of ours: {cure}")
        return scorer
