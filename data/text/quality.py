"""Trains a scorer of quality from graded texts, for prepare.py --quality (sec. 4.2).

    python data/text/quality.py graded.jsonl --label informative --out out/informative.npz
    python data/text/prepare.py notes/ --out out/notes --quality out/informative.npz --keep 0.5

graded.jsonl: lines of JSON with a text and grades from 0 to 5: {"text": ..., "informative": 4,
"reasoning": 1}. The paper had 10,000 texts graded by a large model, by how informative they are;
Remark 4.1 would rather have texts that reason, with fewer specifics: that is another label.
A fifth of the texts is held out, to choose the strength of the regularisation and to judge.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
from rules import Scorer, words  # noqa: E402

from common import check, make_directory, read_rows, run  # noqa: E402

HELD_OUT = 0.2
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # tried; the best on the held-out texts is kept


def train(texts, grades, label, seed=0):
    """A Scorer, and what it is worth on texts that it was not trained on.

    Returns (scorer, report): report has the correlation with the grades, the mean absolute error,
    and that of always saying the mean.
    """
    grades = np.asarray(grades, float)
    order = np.random.default_rng(seed).permutation(len(texts))
    n_held_out = round(HELD_OUT * len(texts))
    held_out = order[:n_held_out]
    seen = order[n_held_out:]
    right = grades[held_out]
    best = None
    for ridge in RIDGES:
        scorer = Scorer.train([texts[i] for i in seen], grades[seen], label, ridge)
        scores = np.array([scorer.score(texts[i]) for i in held_out])
        error = float(np.abs(scores - right).mean())
        if best is None or error < best["error"]:
            spread = scores.std() * right.std()
            together = ((scores - scores.mean()) * (right - right.mean())).mean()
            correlation = float(together / spread) if spread else 0.0
            best = dict(ridge=ridge, error=error, correlation=correlation)
    best["error of the mean"] = float(np.abs(grades[seen].mean() - right).mean())
    return Scorer.train(texts, grades, label, best["ridge"]), best


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("graded", help="lines of JSON: text, and a grade from 0 to 5 for each label")
    p.add_argument("--label", default="informative", help="which grade (Remark 4.1: reasoning)")
    p.add_argument("--out", required=True, help="file of the scorer, .npz")
    a = p.parse_args(argv)
    cure = f"give lines of JSON with 'text' and a grade {a.label!r} from 0 to 5"
    rows = read_rows(a.graded, {"text": str, a.label: float}, cure)
    for row in rows:
        check(0 <= row[a.label] <= 5, f"{a.graded}: a grade of {row[a.label]}: {cure}")
        check(words(row["text"]), f"{a.graded}: a text without a word: {cure}")
    check(len(rows) >= 20, f"{a.graded}: {len(rows)} texts are too few to learn from: give 20")
    texts = [row["text"] for row in rows]
    scorer, report = train(texts, [row[a.label] for row in rows], a.label)
    make_directory(Path(a.out).parent)
    scorer.save(a.out)
    n = round(HELD_OUT * len(rows))
    print(
        f"{len(rows):,} texts graded by {a.label!r}; on {n:,} held out: correlation "
        f"{report['correlation']:.2f}, mean error {report['error']:.2f} of a grade "
        f"(always the mean: {report['error of the mean']:.2f}); ridge {report['ridge']}\n{a.out}"
    )
    return report


if __name__ == "__main__":
    run(main)
