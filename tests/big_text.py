"""Texts of a size and kind that no test has: time and memory of data/text/prepare.py.

    python tests/big_text.py articles --megabytes 2000      2 GB of JSON lines within 1 GB of RAM
    python tests/big_text.py line --megabytes 300           one file in one line
    python tests/big_text.py files --number 50000           tiny files
    python tests/big_text.py mixed --megabytes 20           scripts, emoji, NULs, broken UTF-8

Memory is that of all processes together: shared pages count once (PSS), asked for five times a
second, Linux only.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 30_000


class Words:
    """Random words, a few of them frequent, as in any language (Zipf)."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        letters = np.array(list("etaoinshrdlucmfwypvbgk"))
        lengths = self.rng.integers(2, 10, VOCABULARY)
        self.words = ["".join(self.rng.choice(letters, n)) for n in lengths]
        share = 1 / np.arange(1, VOCABULARY + 1)
        self.cumulated = np.cumsum(share / share.sum())

    def sentences(self, n):
        """A text of n sentences of twelve words."""
        drawn = np.searchsorted(self.cumulated, self.rng.random(12 * n))
        found = [self.words[i] for i in drawn]
        said = [" ".join(found[i : i + 12]).capitalize() for i in range(0, 12 * n, 12)]
        return ". ".join(said) + "."


def write_articles(folder, size):
    words = Words()
    with open(folder / "articles.jsonl", "w") as file:
        number = 0
        while file.tell() < size:
            row = dict(title=f"Article {number}", text=words.sentences(25))
            file.write(json.dumps(row) + "\n")
            number += 1


def write_line(folder, size):
    words = Words()
    with open(folder / "line.txt", "w") as file:
        while file.tell() < size:
            file.write(words.sentences(100) + " ")


def write_files(folder, number):
    words = Words()
    for i in range(number):
        place = folder / f"{i // 1000}"
        place.mkdir(exist_ok=True)
        (place / f"{i}.txt").write_text(words.sentences(6))


def write_mixed(folder, size):
    words = Words()
    rng = np.random.default_rng(1)
    han = "".join(chr(0x4E00 + i) for i in rng.integers(0, 3000, 4000))
    odd = [b"\x00", b"\xff\xfe", b"\xc3", b"\xf0\x9f\x98", "\U0001f600\u200d\U0001f467".encode()]
    with open(folder / "mixed.txt", "wb") as file:
        while file.tell() < size:
            file.write(words.sentences(5).encode())
            at = int(rng.integers(0, 3900))
            file.write((han[at : at + 40] + "。").encode())
            file.write(odd[int(rng.integers(0, len(odd)))])
            file.write(b"\n" if rng.random() < 0.2 else b" ")


def memory_of(pid):
    """Bytes of a process and all that it has started."""
    total = 0
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        try:
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
            waiting += Path(f"/proc/{one}/task/{one}/children").read_text().split()
        except OSError:
            pass  # it has ended
    return total


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("kind", choices=["articles", "line", "files", "mixed"])
    p.add_argument("--megabytes", type=int, default=100)
    p.add_argument("--number", type=int, default=50_000)
    p.add_argument("--out", default="out/big_text", help="is removed first, and afterwards")
    p.add_argument("--flags", default="", help="more flags of prepare.py")
    a = p.parse_args()
    out = Path(a.out)
    shutil.rmtree(out, ignore_errors=True)
    (out / "in").mkdir(parents=True)
    size = a.megabytes * 1_000_000
    if a.kind == "articles":
        write_articles(out / "in", size)
    elif a.kind == "line":
        write_line(out / "in", size)
    elif a.kind == "files":
        write_files(out / "in", a.number)
    else:
        write_mixed(out / "in", size)
    command = [sys.executable, str(ROOT / "data/text/prepare.py"), str(out / "in")]
    command += ["--out", str(out / "data"), *a.flags.split()]
    began = time.time()
    peak = 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.2)
    took = time.time() - began
    print(f"{a.kind}: exit code {process.returncode}, {took:,.0f} s, peak {peak / 1e6:,.0f} MB")
    shutil.rmtree(out)
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
