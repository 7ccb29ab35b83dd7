"""Pieces that say only "it": memories written alone, or in their document (Remark 3.2).

    python experiments/whole_documents.py

A made-up place is told of in a document of two references, and only the first names it:

    Dorvia is in Norway. Dorvia belongs to Europe.
    It has 4243 people. It keeps Asia/Tokyo time. It lies at 12 N 40 E.

The questions name the place and are about the second reference, whose memory is read either alone
("right piece") or among those of the second pieces of four other documents ("among five"), from
which no text tells it. The memories have the same bytes in every row; only how they were written
differs: each piece alone; in its document; and, for comparison, alone but with the name in place of
each "It". The toy has read few texts of this kind: besides the checkpoint as it is, it is trained
for --steps steps (explicit stage: the loss on the answers reaches the writer), on other places,
once for each way of writing, with the same documents, questions and pools.
"""

import argparse
import copy
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import check, number, run
from eval import columns, json_flag, prepare_json, write_result
from generate import model_flags, open_model

ONSETS = "b br d dr f g gr k kl l m n p r s st t tr v z".split()
VOWELS = "a e i o u ai ea".split()
CODAS = ["", "", "", "l", "n", "r", "s", "nd", "rk"]
COUNTRIES = "Norway Chile Kenya Japan Spain Peru Mali Canada Fiji Nepal Cuba Ghana".split()
CONTINENTS = "Europe Africa Asia Oceania".split()
ZONES = "Europe/Oslo Asia/Tokyo Africa/Nairobi America/Lima Asia/Kathmandu Pacific/Fiji".split()
# of each relation that the second piece tells: two questions, and the sentence that answers them
ASKED = dict(
    population=(
        ["How many people live in {}?", "What is the population of {}?"],
        " has {} people.",
    ),
    timezone=(["Which time zone is {} in?", "What time zone does {} keep?"], " keeps {} time."),
    coordinates=(["Where does {} lie?", "What are the coordinates of {}?"], " lies at {}."),
)
WAYS = ["alone", "in document", "named"]
POOLS = {"right piece": 1, "among five": 5}
PAD = -1


# -- Documents ------------------------------------------------------------------------------------


def make_places(n, seed):
    """n places with different names: dicts of name, country, continent and the three facts."""
    rng = random.Random(seed)
    places = {}
    while len(places) < n:
        name = ""
        for _ in range(rng.choice([2, 3])):
            name += rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        name = name.capitalize()
        latitude = f"{rng.randrange(70)} {rng.choice('NS')}"
        longitude = f"{rng.randrange(180)} {rng.choice('EW')}"
        places[name] = dict(
            name=name,
            country=rng.choice(COUNTRIES),
            continent=rng.choice(CONTINENTS),
            population=str(int(10 ** rng.uniform(2, 6))),
            timezone=rng.choice(ZONES),
            coordinates=f"{latitude} {longitude}",
        )
    return list(places.values())


def first_piece(place):
    return "{name} is in {country}. {name} belongs to {continent}.".format(**place)


def second_piece(place, subject="It"):
    """The facts that are asked for; a space before it, as it goes on after the first piece."""
    sentences = [f" {subject}{ASKED[name][1].format(place[name])}" for name in ASKED]
    return "".join(sentences)


@dataclass
class Questions:
    """tokens (B, T): BOS, question, answer; padded with 0. value (B, T): True at tokens of the
    answer's sentence after the name, which is what is learnt and judged."""

    tokens: torch.Tensor
    value: torch.Tensor


def ask(places, rng, tokenizer):
    """A question about each place, of a relation drawn for each."""
    rows = []
    begins = []
    for place in places:
        relation = rng.choice(list(ASKED))
        wordings, sentence = ASKED[relation]
        question = rng.choice(wordings).format(place["name"])
        prompt = [
            tokenizer.bos,
            *tokenizer.encode(question),
            *tokenizer.encode(f" {place['name']}"),
        ]
        answer = tokenizer.encode(sentence.format(place[relation]))
        rows.append(torch.tensor([*prompt, *answer]))
        begins.append(len(prompt))
    tokens = pad_sequence(rows, batch_first=True, padding_value=PAD)  # (B, T)
    at = torch.arange(tokens.shape[1])
    value = (at >= torch.tensor(begins)[:, None]) & (tokens >= 0)  # (B, T)
    return Questions(tokens.clamp(min=0), value)


# -- Writing and reading --------------------------------------------------------------------------


def write_second(model, tokenizer, places, way):
    """The memories of the second pieces of all places, in their order."""

    def rows(texts):
        encoded = [torch.tensor(tokenizer.encode(text)) for text in texts]
        return pad_sequence(encoded, batch_first=True, padding_value=PAD)  # (N, n)

    if way == "named":
        return model.write(rows([second_piece(place, place["name"]) for place in places]))
    if way == "alone":
        return model.write(rows([second_piece(place) for place in places]))
    texts = []
    for place in places:
        texts += [first_piece(place), second_piece(place)]
    documents = torch.arange(len(places)).repeat_interleave(2)
    return model.write(rows(texts), documents=documents)[1::2]


def pool_table(n, size, rng):
    """Which memories the question of each of n places reads: its own and size - 1 others, in any
    order (n, size)."""
    table = []
    for i in range(n):
        others = rng.sample([j for j in range(n) if j != i], size - 1)
        row = [i, *others]
        rng.shuffle(row)
        table.append(row)
    return torch.tensor(table)


def read(model, questions, memories, table):
    """-> log-probabilities of tokens 1, 2, ... (B, T-1), whether each is the likeliest, and which
    of them are judged."""
    tokens = questions.tokens.to(model.device)
    n_chunks = -(-tokens.shape[1] // model.config.chunk_len)
    recall = table.to(model.device)[:, None].expand(-1, n_chunks, -1)  # (B, c, R)
    logits, _ = model(tokens, memories=memories, recall=recall)  # (B, T, V)
    logits = logits[:, :-1].float()
    targets = tokens[:, 1:]  # (B, T-1)
    each = -F.cross_entropy(logits.mT, targets, reduction="none")  # (B, T-1)
    likeliest = logits.argmax(-1) == targets
    return each, likeliest, questions.value[:, 1:].to(model.device)


def train(model, tokenizer, way, a):
    """The explicit stage on made-up documents: a trained copy of the model."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), a.lr, (0.9, 0.95), weight_decay=0.0)
    rng = random.Random(a.seed)
    places = make_places(a.places, a.seed)
    began = time.time()
    for step in range(1, a.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = a.lr * min(1, step / 20, (a.steps - step + 1) / (0.4 * a.steps))
        some = rng.sample(places, a.batch)
        questions = ask(some, rng, tokenizer)
        size = rng.choice(list(POOLS.values()))
        table = pool_table(a.batch, size, rng)
        memories = write_second(model, tokenizer, some, way)
        each, _, judged = read(model, questions, memories, table)
        loss = -each[judged].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == a.steps:
            rate = (time.time() - began) / step
            print(
                f"{way}: step {step}, {size} read, loss {loss:.3f}, {rate:.2f} s/step", flush=True
            )
    return model.eval()


@torch.inference_mode()
def judge(model, tokenizer, way, a):
    """-> {pool: exact and nats of an answer} on places that no training has seen."""
    places = make_places(a.places + a.questions, a.seed)[a.places :]
    result = {}
    for pool, size in POOLS.items():
        rng = random.Random(a.seed + 1)
        exact = 0.0
        nats = 0.0
        for start in range(0, len(places), a.batch):
            some = places[start : start + a.batch]
            questions = ask(some, rng, tokenizer)
            table = pool_table(len(some), size, rng)
            memories = write_second(model, tokenizer, some, way)
            each, likeliest, judged = read(model, questions, memories, table)
            exact += float((likeliest | ~judged).all(1).sum())
            nats -= float((each * judged).sum())
        result[pool] = dict(exact=exact / len(places), nats=nats / len(places))
    return result


def table(result):
    """The result in Markdown."""
    head = ["model, second piece", "bytes"]
    for pool in POOLS:
        head += [f"{pool}: exact", "nats"]
    lines = [head]
    for name, row in sorted(result["rows"].items()):
        cells = [name, f"{result['bytes']:,}"]
        for pool in POOLS:
            cells += [f"{row[pool]['exact']:.3f}", f"{row[pool]['nats']:.2f}"]
        lines.append(cells)
    return columns(*lines)


def main(argv=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    model_flags(p, bank=False)
    p.add_argument("--steps", type=number(int, 0), default=80, help="of training, each way")
    p.add_argument("--batch", type=number(int, 6), default=12, help="documents at a time")
    p.add_argument("--lr", type=number(float, 0), default=1e-3, help="its highest value")
    p.add_argument("--places", type=number(int, 6), default=4000, help="to train on")
    p.add_argument("--questions", type=number(int, 6), default=480, help="to judge by; others")
    p.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help="to train and judge")
    p.add_argument("--seed", type=int, default=1)
    json_flag(p)
    a = p.parse_args(argv)
    prepare_json(a)
    whole = a.questions % a.batch == 0
    check(whole, f"--questions {a.questions}: a multiple of --batch {a.batch}")
    model, tokenizer = open_model(a.checkpoint, a.data, a.device, verify=not a.no_verify)
    rows = {}
    for way in a.ways:
        rows[f"as it is, {way}"] = judge(model, tokenizer, way, a)
        if a.steps:
            trained = train(model, tokenizer, way, a)
            rows[f"trained, {way}"] = judge(trained, tokenizer, way, a)
    bytes_each = 2 * math.prod(model.config.record_shape)  # bfloat16
    result = dict(model=model.fingerprint(), bytes=bytes_each, steps=a.steps, rows=rows)
    print(f"\n{table(result)}")
    write_result(a, result)
    return result


if __name__ == "__main__":
    run(main)
