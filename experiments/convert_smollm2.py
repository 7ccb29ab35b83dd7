"""A real model learns to read memories: SmolLM2-135M-Instruct and the World Factbook.

    python convert.py SmolLM2-135M-Instruct.Q4_1.gguf --out out/smollm2
    python data/factbook/prepare.py --tokenizer out/smollm2
    python experiments/convert_smollm2.py items --init out/smollm2     what is asked, and recalled
    python experiments/convert_smollm2.py train --init out/smollm2 --seconds 240

Explicit-stage finetuning (sec. 3.6) of all weights. A window of text asks about one country; each
of its chunks brings one reference of that country, and reads up to five memories: those it needs,
and others of the same country or of the same fields. Nearly all countries are made up: a new name,
and values that are drawn anew for every window. Nothing is there to be memorised, so the answer
must be read. Two more kinds of text keep what the model knew: facts that stand in the context, and
prose, on which it is to stay what it was (the loss is the KL divergence from the model before).

Asked are 40 countries that nothing was trained on, of a knowledge base of all countries.
"""

import argparse
import copy
import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrize import register_parametrization

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import corpus  # noqa: E402
import train  # noqa: E402
from common import check, find_device  # noqa: E402
from memory import Memories  # noqa: E402
from model import load_checkpoint, save_checkpoint  # noqa: E402

QUESTIONS = [
    "What is {name}'s {field}?",
    "What is the {field} of {name}?",
    "Tell me the {field} of {name}.",
    "{name}: {field}?",
    "Do you know {name}'s {field}?",
]
STATEMENTS = ["{name}'s {field} is", "The {field} of {name} is", "{name}, {field}:"]
ASKED = QUESTIONS[0]  # in evaluation
EMBEDDER = "hash:4096"  # recall of the right reference among five: 0.960, with hash:512 0.912

# -- Text ---------------------------------------------------------------------------------------


def sentence(name, field, value):  # as data/factbook/prepare.py writes it
    return f"{name}'s {field} is {value}."


class World:
    """The countries that may be trained on, and as many made-up ones as are wanted."""

    def __init__(self, data):
        countries = json.loads(Path(data, "facts.json").read_text())
        self.countries = [c for c in countries if not c["held_out"]]
        self.held_out = [c for c in countries if c["held_out"]]
        self.values = {}  # field -> the values it has in some country
        for country in self.countries:
            for field, value in country["facts"]:
                self.values.setdefault(field, []).append(value)
        self.names = [c["name"] for c in self.countries]
        self.names += self.values["capital (name)"]

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
        """The field's value in another country, with other digits."""
        value = rng.choice(self.values[field])
        if rng.random() < 0.25:
            return value
        digits = list(value)
        for i, letter in enumerate(digits):
            if letter.isdigit() and rng.random() < 0.7:
                leading = i == 0 or not digits[i - 1].isdigit()
                digits[i] = str(rng.randint(1 if leading and letter != "0" else 0, 9))
        return "".join(digits)

    def entity(self, country, groups, rng, real):
        """(name, facts of each group): as it is, or with another name and other values."""
        facts = [[tuple(country["facts"][i]) for i in group] for group in groups]
        if real:
            return country["name"], facts
        new = [[(field, self.new_value(field, rng)) for field, _ in group] for group in facts]
        return self.new_name(rng), new


def ask(name, field, rng, tok):
    """A prompt that an answer follows: token ids."""
    if rng.random() < 0.25:
        return tok.encode(rng.choice(STATEMENTS).format(name=name, field=field))
    question = QUESTIONS[0] if rng.random() < 0.4 else rng.choice(QUESTIONS)
    return tok.encode("Question: " + question.format(name=name, field=field) + "\nAnswer:")


def fitting(tok, name, facts, ref_len):
    """As many of the facts as a reference has room for, and its tokens."""
    for n in range(len(facts), 0, -1):
        text = " ".join(sentence(name, *fact) for fact in facts[:n])
        tokens = tok.encode(text)
        if len(tokens) <= ref_len:
            return facts[:n], text, tokens
    return [], text, tokens[:ref_len]


def window_of(tok, entity, T, C, ref_len, rng, in_context):
    """One window of questions about an entity. in_context: one of its references stands in the
    context, and is asked for first.

    Returns tokens [T], targets [T] (-1: no loss), the references' tokens (a list), and for each
    chunk the set of references that it needs.
    """
    name, groups = entity
    groups, texts, references = zip(*(fitting(tok, name, g, ref_len) for g in groups), strict=True)
    tokens = [tok.bos]
    answered = [False]
    needs = [set() for _ in range(T // C)]
    pairs = [(g, fact) for g, group in enumerate(groups) for fact in group]
    rng.shuffle(pairs)
    shown = None
    if in_context:
        shown = rng.randrange(len(groups))
        tokens += tok.encode(texts[shown] + "\n")
        answered += [False] * (len(tokens) - 1)
        pairs.sort(key=lambda pair: pair[0] != shown)
    while len(tokens) <= T:
        for group, (field, value) in pairs:
            prompt = ask(name, field, rng, tok)
            answer = tok.encode(f" {value}\n")
            start = len(tokens)
            tokens += prompt + answer
            answered += [False] * len(prompt) + [True] * len(answer)
            last = min(len(tokens) - 1, T - 1)
            for chunk in range(start // C, last // C + 1 if group != shown else 0):
                needs[chunk].add(group)
            if len(tokens) > T:
                break
    targets = [t if a else -1 for t, a in zip(tokens[1:], answered[1:], strict=True)]
    return tokens[:T], targets[:T], references, needs


class Batches(torch.utils.data.IterableDataset):
    """Endless batches: tokens, targets (B, T), references (B*c, n) and recall (B, c, R) as in
    train.py, and prose (n, T). Windows 2j and 2j+1 ask for the same fields of two entities."""

    def __init__(self, world, tok, config, batch, T, prose, n_prose, seed):
        self.world, self.tok, self.config = world, tok, config
        self.batch, self.T, self.seed = batch, T, seed
        self.prose, self.n_prose = prose, n_prose

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(1000 * self.seed + (worker.id if worker else 0))
        while True:
            yield self.make(rng)

    def make(self, rng):
        T, C, R = self.T, self.config.chunk_len, self.config.n_recall
        c = T // C
        tokens, targets, references, needed, modes = [], [], [], [], []
        for b in range(self.batch):
            if b % 2 == 0:
                country = rng.choice(self.world.countries)
                first = rng.randrange(len(country["groups"]) - c)
                groups = country["groups"][first : first + c]
                if rng.random() < 0.5:
                    groups = rng.sample(country["groups"], c)
            entity = self.world.entity(country, groups, rng, real=rng.random() < 0.15)
            mode = rng.choices(
                ["five", "right", "none", "wrong", "context"], [0.55, 0.15, 0.05, 0.05, 0.2]
            )[0]
            made = window_of(self.tok, entity, T, C, self.config.ref_len, rng, mode == "context")
            tokens.append(made[0])
            targets.append(made[1])
            references += list(made[2])
            needed.append(made[3])
            modes.append(mode)
        recall = np.full((self.batch, c, R), -1)
        for b in range(self.batch):
            for chunk in range(c):
                rows = self.recalled(b, modes[b], needed[b][chunk], c, rng)
                recall[b, chunk, : len(rows)] = rows
        width = max(len(r) for r in references)
        padded = np.full((len(references), width), -1)
        for row, reference in zip(padded, references, strict=True):
            row[: len(reference)] = reference
        starts = [rng.randrange(len(self.prose) - self.T) for _ in range(self.n_prose)]
        prose = np.stack([self.prose[s : s + self.T] for s in starts])
        prose[:, 0] = self.tok.bos
        arrays = (np.array(tokens), np.array(targets), padded, recall, prose)
        return [torch.from_numpy(x) for x in arrays]

    def recalled(self, b, mode, needed, c, rng):
        """Rows of the pool that a chunk of window b reads, at most R."""
        R = self.config.n_recall
        own = [b * c + g for g in needed]
        sibling = b ^ 1 if (b ^ 1) < self.batch else b
        others = [b * c + g for g in range(c) if g not in needed and mode == "five"]
        others += [sibling * c + g for g in range(c)]
        others += [rng.randrange(self.batch * c) for _ in range(2)]
        others = list(dict.fromkeys(row for row in others if row not in own))
        if mode == "wrong":
            others = [row for row in others if row // c != b]
        rng.shuffle(others)
        if mode == "none":
            return []
        if mode == "right":
            return own[:R]
        if mode == "wrong":
            return others[:R]
        return (own + others)[:R]


def prose_tokens(countries, tok):
    texts = [text for country in countries for text in country["prose"]]
    return np.array([t for text in texts for t in tok.encode(text + "\n\n")])


# -- Evaluation ---------------------------------------------------------------------------------


def make_items(a):
    """What is asked: facts of held-out countries, with the five references found for each."""
    import retrieval  # needs faiss, which training does not

    tok = corpus.tokenizer(a.data)
    references = corpus.References.open(f"{a.data}/kb", tok.n_vocab)
    found = retrieval.Retriever.build(Path(a.data, "kb.index"), references, a.data, EMBEDDER)
    rng = random.Random(0)
    items = []
    for country in World(a.data).held_out:
        for group in rng.sample(range(len(country["groups"])), a.per_country):
            field, value = country["facts"][rng.choice(country["groups"][group])]
            prompt = f"Question: {ASKED.format(name=country['name'], field=field)}\nAnswer:"
            random_ids = rng.sample(range(len(references)), 5)
            item = dict(prompt=prompt, answer=f" {value}\n", right=country["first"] + group)
            items.append(item | dict(random=random_ids))
    rng.shuffle(items)
    ids, _ = found.search([item["prompt"] for item in items], 5)
    for item, row in zip(items, ids.tolist(), strict=True):
        item["recalled"] = row
    hits = np.mean([item["right"] in item["recalled"] for item in items])
    Path(a.data, "items.json").write_text(json.dumps(items))
    print(f"{len(items)} questions; the right reference is among the five found for {hits:.3f}")


CONDITIONS = ("plain", "empty pool", "random", "recalled", "right", "text", "text of recalled")
READING = ("random", "recalled", "right")  # memories


@torch.no_grad()
def answers(model, tok, references, items, condition, cast, size=40):
    """(nats of each answer, is every token of it the likeliest) under one condition."""
    device, C = model.device, model.config.chunk_len
    nats, exact = [], []
    for start in range(0, len(items), size):
        part = items[start : start + size]
        rows = []
        for item in part:
            prompt = item["prompt"]
            if condition == "text":
                prompt = tok.decode(references[item["right"]]) + "\n" + prompt
            if condition == "text of recalled":
                texts = [tok.decode(references[i]) for i in item["recalled"]]
                prompt = "\n".join([*texts, prompt])
            rows.append((tok.encode(prompt), tok.encode(item["answer"])))
        T = max(1 + len(p) + len(answer) for p, answer in rows)
        tokens = torch.full((len(rows), T), tok.bos)
        targets = torch.full((len(rows), T), -1)
        for b, (prompt, answer) in enumerate(rows):
            n = len(prompt) + len(answer)
            tokens[b, 1 : n + 1] = torch.tensor(prompt + answer)
            targets[b, len(prompt) : n] = torch.tensor(answer)
        memories = recall = None
        if condition == "empty pool":
            memories = Memories.empty(model.config, device)
        if condition in ("random", "recalled", "right"):
            ids = [[item["right"]] if condition == "right" else item[condition] for item in part]
            R = len(ids[0])
            recall = torch.arange(len(part) * R, device=device).view(-1, 1, R)
            recall = recall.expand(-1, -(-T // C), -1)  # each chunk reads the same
        with cast:
            if recall is not None:
                memories = model.write(references.batch(sum(ids, [])).to(device))
            logits, _ = model(tokens.to(device), None, memories, recall)
        logits, targets = logits.float(), targets.to(device)
        losses = F.cross_entropy(logits.mT, targets, ignore_index=-1, reduction="none")
        nats += losses.sum(1).tolist()
        right = (logits.argmax(-1) == targets) | (targets < 0)
        exact += right.all(1).tolist()
    return np.mean(nats), np.mean(exact)


@torch.no_grad()
def prose_loss(model, tokens, cast, most, pool=None, T=256):
    """Nats a token of prose (n,), plain or, with a pool, beside five memories of it a chunk."""
    config, device = model.config, model.device
    n = min(most, len(tokens) // T)
    windows = torch.from_numpy(tokens[: n * T].reshape(n, T)).clone()
    targets = torch.cat([windows[:, 1:], torch.full((n, 1), -1)], 1)
    windows[:, 0] = config.header[0]
    total = 0.0
    rng = np.random.default_rng(0)
    for i in range(0, n, 16):
        part = windows[i : i + 16].to(device)
        recall = None
        if pool is not None and len(pool):
            shape = (len(part), T // config.chunk_len, config.n_recall)
            recall = torch.from_numpy(rng.integers(len(pool), size=shape)).to(device)
        with cast:
            loss = model(part, targets[i : i + 16].to(device), pool, recall)[1]
        total += loss.item() * len(part) / n
    return total


def evaluate(model, tok, references, items, prose, cast, conditions=CONDITIONS, windows=64):
    """{condition: [nats an answer, exact]}, {text: {format: nats a token}}; prints them."""
    model.eval()
    result = {}
    for condition in conditions:
        nats, exact = answers(model, tok, references, items, condition, cast)
        result[condition] = [round(float(nats), 3), round(float(exact), 4)]
    some = [i for item in items[:20] for i in item["random"]]
    with torch.no_grad(), cast:
        pool = model.write(references.batch(some).to(model.device))
    texts = {}
    for name, tokens in prose.items():
        texts[name] = dict(
            plain=round(prose_loss(model, tokens, cast, windows), 4),
            empty=round(prose_loss(model, tokens, cast, windows, pool[[]]), 4),
            random=round(prose_loss(model, tokens, cast, windows, pool), 4),
        )
    model.train()
    print("  ".join(f"{k} {n:.2f} ({e:.2f})" for k, (n, e) in result.items()))
    print("  prose, nats a token:", json.dumps(texts), flush=True)
    return dict(answers=result, prose=texts)


# -- Training -----------------------------------------------------------------------------------


class LowRank(torch.nn.Module):
    """A weight W (out, in) that stays as it is, plus B A of a low rank, which is learnt (LoRA)."""

    def __init__(self, weight, rank):
        super().__init__()
        n_out, n_in = weight.shape
        self.a = torch.nn.Parameter(torch.randn(rank, n_in, device=weight.device) / n_in**0.5)
        self.b = torch.nn.Parameter(torch.zeros(n_out, rank, device=weight.device))

    def forward(self, weight):
        return weight + self.b @ self.a


def freeze(model, only, rank):
    """Leaves only some of the weights to be trained; returns how many numbers these are.

    only: "all"; "attention", the projections of all layers; "low_rank", updates of rank `rank` to
    the projections of the layers with memories and of those before them, which write them.
    """
    if only != "all":
        for name, p in model.named_parameters():
            p.requires_grad_(only == "attention" and ".attn." in name)
    if only == "low_rank":
        for block in model.blocks[: model.config.memory_layers.stop]:
            for linear in (block.attn.qkv, block.attn.out):
                update = LowRank(linear.weight, rank)
                register_parametrization(linear, "weight", update)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def step_loss(model, teacher, batch, S, step):
    """Cross-entropy of the answers, and the divergence from the teacher on prose."""
    tokens, targets, references, recall, prose = batch
    model.config.memory_tokens = S
    memories = model.write(references)
    loss = model(tokens, targets, memories, recall)[1]
    with torch.no_grad():
        before = teacher(prose)[0].float().log_softmax(-1)
    if step % 2:  # half of the time beside memories that have nothing to do with it
        n, c = len(prose), prose.shape[1] // model.config.chunk_len
        rows = torch.arange(n * c * model.config.n_recall, device=prose.device)
        beside = rows.view(n, c, -1) * 7 % len(references)
        pool = Memories(memories.kv.detach(), memories.count)
        after = model(prose, None, pool, beside)[0]
    else:
        after = model(prose)[0]
    after = after.float().log_softmax(-1)
    kl = F.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean()
    return loss, kl


def run(a):
    started = time.time()
    torch.manual_seed(a.seed)
    device = find_device(a.device)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    model, meta = load_checkpoint(a.init)
    model.config.n_memory_layer = a.n_memory_layer
    model.config.memory_from = a.memory_from
    model.config.memory_tokens = max(a.memory_tokens)
    tok = corpus.tokenizer(a.data)
    references = corpus.References.open(f"{a.data}/kb", tok.n_vocab)
    items = json.loads(Path(a.data, "items.json").read_text())[: a.items]
    world = World(a.data)
    prose = dict(factbook=prose_tokens(world.held_out, tok))
    prose["readme"] = np.array(tok.encode((HERE.parent / "README.md").read_text()))
    model.to(device)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    if device.type == "cuda":
        teacher.to(torch.bfloat16)
    manual = np.array(tok.encode("\n\n".join(topics.topics.values())))  # of Python: more prose
    text = np.concatenate([prose_tokens(world.countries, tok), manual])
    data = Batches(world, tok, model.config, a.batch, a.context, text, a.prose, a.seed)
    loader = iter(torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=a.workers, pin_memory=device.type == "cuda",
        prefetch_factor=2 if a.workers else None,
    ))  # fmt: skip
    n_trained = freeze(model, a.only, a.rank)
    print(f"trained: {a.only}, {n_trained:,} numbers")
    cfg = train.TrainConfig(lr=a.lr, weight_decay=0.01)
    optimizer = train.make_optimizer(model, cfg)
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    results = dict(
        trained=n_trained, config={k: str(v) for k, v in vars(a).items()}, evaluations=[]
    )

    def record(step, seconds, S, conditions=CONDITIONS, some=None):
        model.config.memory_tokens = S
        print(f"step {step}, {seconds:.0f} s, S {S}:")
        texts = prose if S == a.memory_tokens[-1] else {}
        row = evaluate(model, tok, references, items[:some], texts, cast, conditions, a.windows)
        results["evaluations"].append(dict(step=step, seconds=seconds, S=S, **row))
        (out / "results.json").write_text(json.dumps(results, indent=1))

    layers = f"Lm {a.n_memory_layer} from {a.memory_from}"
    setup = time.time() - started
    print(f"{a.out}: {layers}, S {a.memory_tokens}, {len(items)} questions, setup {setup:.0f} s")
    for S in a.memory_tokens:
        record(0, 0, S, CONDITIONS if S == a.memory_tokens[-1] else READING)
    quick = ("plain", "recalled", "right", "text")
    start = time.time()
    next_eval = a.every
    rng = random.Random(a.seed)
    sums = np.zeros(2)
    step = last = 0
    while True:
        seconds = time.time() - start
        done = step / a.steps if a.steps else seconds / a.seconds
        if done >= 1:
            break
        scale = min(1.0, (step + 1) / a.warmup, (1 - done) / a.decay)
        for group in optimizer.param_groups:
            group["lr"] = a.lr * scale
        S = rng.choice(a.memory_tokens)
        batch = [x.to(device, non_blocking=True) for x in next(loader)]
        with cast:
            loss, kl = step_loss(model, teacher, batch, S, step)
        (loss + a.kl * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % a.log == 0:
            sums = np.array([loss.item(), kl.item(), float(norm)])
            seconds = time.time() - start
            rate = a.log * a.batch * a.context / (seconds - last)
            last = seconds
            print(f"step {step}  {seconds:.0f} s  answers {sums[0]:.3f} nats a token  prose KL "
                  f"{sums[1]:.4f}  norm {sums[2]:.2f}  lr {a.lr * scale:.1e}  S {S}  "
                  f"{rate:,.0f} tokens/s", flush=True)  # fmt: skip
            check(
                np.isfinite(sums).all(), f"--lr {a.lr}: the loss is not finite; give a smaller one"
            )
        if seconds >= next_eval:
            pause = time.time()
            record(step, seconds, a.memory_tokens[-1], quick, 80)
            next_eval += a.every
            start += time.time() - pause  # the time of training alone counts
    seconds = time.time() - start
    results["tokens"] = step * a.batch * a.context
    if device.type == "cuda":
        results["card"] = torch.cuda.get_device_name(device)
        results["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    for S in reversed(a.memory_tokens):
        record(step, seconds, S, CONDITIONS if S == a.memory_tokens[-1] else READING)
    if a.save:
        model.config.memory_tokens = a.memory_tokens[-1]
        meta["config"] = asdict(model.config)
        save_checkpoint(out / "model.pt", model.state_dict(), meta | dict(stage="explicit"))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("command", choices=["items", "train"])
    p.add_argument("--init", default="out/smollm2", help="the converted model")
    p.add_argument("--data", default="data/factbook", help="prepared by data/factbook/prepare.py")
    p.add_argument("--out", default="out/factbook", help="results.json")
    p.add_argument("--per_country", type=int, default=10, help="items: questions a country")
    p.add_argument("--items", type=int, default=400, help="questions to ask")
    p.add_argument("--windows", type=int, default=64, help="of 256 tokens of each held-out prose")
    p.add_argument("--n_memory_layer", type=int, default=30, help="Lm")
    p.add_argument("--memory_from", type=int, default=0, help="the first memory layer")
    p.add_argument("--memory_tokens", type=int, nargs="+", default=[8, 16, 32], help="S; each "
                   "step draws one")  # fmt: skip
    p.add_argument("--seconds", type=float, default=240, help="of training")
    p.add_argument("--steps", type=int, default=0, help="of training, instead of seconds")
    p.add_argument("--only", default="all", choices=["all", "attention", "low_rank"],
                   help="weights to train")  # fmt: skip
    p.add_argument("--rank", type=int, default=16, help="of low-rank updates")
    p.add_argument("--batch", type=int, default=64, help="windows a step")
    p.add_argument("--context", type=int, default=256, help="tokens of a window")
    p.add_argument("--prose", type=int, default=8, help="windows of prose a step")
    p.add_argument("--kl", type=float, default=1.0, help="weight of the loss on prose")
    p.add_argument("--lr", type=float, default=5e-4, help="highest learning rate")
    p.add_argument("--warmup", type=int, default=60, help="steps")
    p.add_argument("--decay", type=float, default=0.5, help="share of the run that decays")
    p.add_argument("--every", type=float, default=45, help="seconds between quick evaluations")
    p.add_argument("--log", type=int, default=20, help="steps between lines")
    p.add_argument("--workers", type=int, default=10, help="processes that make batches")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--device", default="auto")
    p.add_argument("--save", action="store_true", help="keep the weights as out/model.pt")
    a = p.parse_args(argv)
    if a.command == "items":
        make_items(a)
    else:
        run(a)


if __name__ == "__main__":
    main()
