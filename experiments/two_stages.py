"""Fig. 3.3 at toy scale, and which of the paper's choices matter there.

    python experiments/two_stages.py              runs what is not done yet, then table and picture
    python experiments/two_stages.py --table      the tables again, from the JSON
    python experiments/two_stages.py --quick      every run in miniature, to see that all works

Left plot: a plain model, and one that reads explicit memories from its first step. Right plot: both
go on, with the same schedule: plain then plain, plain then explicit, explicit then explicit. All
arms of a plot read the same tokens. Then the plain models go on with one choice changed at a time:
how many tokens a memory keeps, and which; how many layers and references; how weights are summed.

The text is made up (no download): lists of facts such as " dolo bave craft fimoso", about three
people a document. The second time a document says a fact, it can be read off the first: reading
comprehension. The first time only a memory can tell it, for the people of the validation text are
in no training text. One text thus holds both, and plain and explicit arms can read the same tokens.
"""

import argparse
import base64
import contextlib
import json
import multiprocessing
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import corpus
import memory
import model as decoder
import retrieval
import train
from common import check, number, optional, read_json, read_rows, replace_file, run, write_json
from quantize import Codec

SEEDS = (1, 2, 3)
C, T = 16, 128  # tokens of a chunk, and of a document: a BOS and 31 facts of 4 tokens
RELATIONS = ("home", "craft", "food", "song", "tool", "fear")
VALUES = 16  # of each relation: an unknown value costs ln 16 = 2.77 nats
PEOPLE, HELD_OUT = 12_000, 1_000  # HELD_OUT of them only in the validation text

SHAPE = dict(
    n_layer=4,
    n_memory_layer=2,
    n_head=2,
    n_kv_head=2,
    head_dim=32,
    mlp_width=128,
    chunk_len=C,
    n_recall=5,
    memory_tokens=8,
    ref_len=4 * len(RELATIONS),
    max_context=T,
    tied=True,
)

BASE = "S = 8, Lm = 2, R = 5, exact weights"  # what one change at a time is compared with

# -- The text ---------------------------------------------------------------------------------


def prepare(out, rows, val_rows, people=PEOPLE, held_out=HELD_OUT):
    """A data set in the directory `out`: train, val, the references kb, and the neighbours."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    n_names = 128  # first names, and as many last names
    n_relations = len(RELATIONS)
    n_values = n_relations * VALUES
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = rng.permutation([a + b for a in syllables for b in syllables])
    names = words[: 2 * n_names]
    values = [word + rng.choice(syllables) for word in words[2 * n_names :][:n_values]]
    vocab = ["Reference", ":"]
    vocab += [f" {word}" for word in (*names, *RELATIONS, *values)]
    ranks = [base64.b64encode(word.encode()).decode() for word in vocab]  # every word is one token
    spelling = dict(name="people", pattern=r" ?\w+|:", prefix_space=True)
    write_json(out / "tokenizer.json", dict(spelling, ranks=ranks))
    tok = corpus.tokenizer(out)

    # A first and a last name together are one person's. A fact: first, last, relation, value.
    first_name = 2  # where these words begin in the vocabulary
    last_name = first_name + n_names
    relation = last_name + n_names
    value = relation + n_relations
    who = rng.permutation(n_names * n_names)[:people]
    facts = np.empty((people, n_relations, 4), int)
    facts[..., 0] = first_name + who[:, None] // n_names
    facts[..., 1] = last_name + who[:, None] % n_names
    facts[..., 2] = relation + np.arange(n_relations)
    drawn = rng.integers(VALUES, size=(people, n_relations))
    facts[..., 3] = value + np.arange(n_relations) * VALUES + drawn
    order = rng.permuted(np.tile(np.arange(n_relations), (people, 1)), axis=1)
    texts = [facts[i][order[i]].ravel() for i in range(people)]
    references = corpus.References.create(out / "kb", texts, tok.n_vocab)

    known = people - held_out
    for split, low, high, size in ("train", 0, known, rows), ("val", known, people, val_rows):
        text = documents(facts, low, high, size, rng)  # (size, T)
        bos = np.full((size, 1), tok.bos)
        text = np.concatenate([bos, text], 1)[:, :T]
        corpus.write_tokens(out / f"{split}.bin", text, tok.n_vocab)
    meta = dict(name="people", tokenizer=str(out), tokenizer_id=tok.id, n_vocab=tok.n_vocab)
    write_json(out / "meta.json", meta)
    found = retrieval.Retriever.build(out / "kb.index", references, out)
    for split in "val", "train":
        tokens = corpus.open_tokens(out, split)
        path = out / f"{split}.neighbors.bin"
        retrieval.write_neighbors(path, tokens, C, references, found, 1, context=T)


def documents(facts, low, high, size, rng, people=3, stay=0.6):
    """(size, T) tokens: facts of three people each, one person's after another's by chance."""
    cast = rng.integers(low, high, size=(size, people))
    rows = np.empty((size, T // 4, 4), int)
    at = np.zeros(size, int)  # of whom each document speaks
    each = np.arange(size)
    for i in range(T // 4):
        leave = rng.random(size) > stay
        at = np.where(leave, rng.integers(people, size=size), at)
        rows[:, i] = facts[cast[each, at], rng.integers(len(RELATIONS), size=size)]
    return rows.reshape(size, -1)


# -- The runs ---------------------------------------------------------------------------------


def plan(quick=False):
    """Two waves of runs: {name: what}. The second wave starts from checkpoints of the first.

    A run is dict(arm, seed, stage, steps, init=, changes=, select=).
    """
    first = 3 if quick else 1200  # paper: 60 billion tokens
    second = 2 if quick else 400  # paper: 22 billion
    shorter = 2 if quick else 150  # of the runs with one choice changed
    seeds = SEEDS[:1] if quick else SEEDS
    left = {}
    for arm, stage in ("explicit", "explicit"), ("plain", "implicit"):  # the longest first
        for seed in seeds:
            left[f"{arm}-{seed}"] = dict(arm=arm, seed=seed, stage=stage, steps=first)
    right = {}
    for seed in seeds:
        for before, after in ("explicit", "explicit"), ("plain", "explicit"), ("plain", "plain"):
            arm = f"{before} then {after}"
            stage = "explicit" if after == "explicit" else "implicit"
            run = dict(arm=arm, seed=seed, stage=stage, steps=second, init=f"{before}-{seed}")
            right[f"{before}-{after}-{seed}"] = run
    for seed in seeds:
        for choice, change in changes().items():
            run = dict(arm=choice, seed=seed, stage="explicit", steps=shorter, init=f"plain-{seed}")
            key = "base" if choice == BASE else choice.replace(" ", "")
            right[f"choice-{key}-{seed}"] = run | change
    return left, right


def changes():
    """{choice: what is changed}, one thing at a time."""
    n_layer = SHAPE["n_layer"]
    shapes = {BASE: {}}
    for s in (1, 2, 4, 16):
        shapes[f"S = {s}"] = dict(memory_tokens=s)
    for n in (n_layer // 4, n_layer // 2, n_layer):
        if n != SHAPE["n_memory_layer"]:
            shapes[f"Lm = {n}"] = dict(n_memory_layer=n)
    for r in (1, 3, 10):
        shapes[f"R = {r}"] = dict(n_recall=r)
    shapes["approximate weights"] = dict(approximate_weights=True)
    choices = {choice: dict(changes=change) for choice, change in shapes.items()}
    for how in SELECT:
        choices[f"{how} tokens"] = dict(select=how)
    return choices


# These stand in for memory.keep_tokens while a run writes its memories.


def random_tokens(q, k, mask, s, approximate=False, selection=1):
    """Other tokens at each writing, whatever attention they get."""
    return memory.select_tokens(torch.rand(k.shape[:3], device=k.device), mask, s)


def first_tokens(q, k, mask, s, approximate=False, selection=1):
    ranks = -torch.arange(k.shape[2], device=k.device, dtype=torch.float32)
    return memory.select_tokens(ranks.expand(k.shape[:3]), mask, s)


SELECT = {"random": random_tokens, "first": first_tokens}
REDUCED = ("bfloat16", "quantized")


def do(run, name, out, device="auto", quick=False):
    """Trains one run in its own directory and measures it; returns the result, which is kept there.

    A finished run is skipped, a stopped one goes on from its last checkpoint.
    """
    path = Path(out) / "runs" / name
    if (path / "result.json").exists():
        result = read_json(path / "result.json", {}, "remove it, and the run is done again")
        same = run.items() <= result.items()
        check(same, f"{path} is a run of other settings: give another --out, or remove that run")
        return result
    path.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # two runs side by side are faster than one on two threads
    data = f"{out}/data"
    init = run.get("init", "")
    tok = corpus.tokenizer(data)
    shape = SHAPE | run.get("changes", {})
    config = decoder.Config(**shape, vocab_size=tok.n_vocab, header=tuple(tok.header))
    eval_every = run["steps"] if name.startswith("choice") else 50
    cfg = train.TrainConfig(
        data=data,
        stage=run["stage"],
        split="train",
        val="val",
        out=str(path),
        seed=run["seed"],
        init=f"{out}/runs/{init}" if init else "",
        context=T,
        batch=4 if quick else 32,
        steps=run["steps"],
        lr=2e-3 if init else 4e-3,
        warmup=50 if init else 100,
        decay=0.3 if init else 0.1,
        eval_every=1 if quick else eval_every,
        save_every=100,
        device=device,
    )
    started = time.time()
    decoder.keep_tokens = SELECT.get(run.get("select"), memory.keep_tokens)
    try:
        with open(path / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            model = train.main(cfg, config)["model"]
        final = measure(model.eval(), cfg, run)
    finally:
        decoder.keep_tokens = memory.keep_tokens
    tokens_per_step = cfg.batch * T
    result = dict(run, tokens=run["steps"] * tokens_per_step)
    result["seconds"] = round(time.time() - started)
    result["curve"] = curve_of(path / "log.jsonl", tokens_per_step)
    result["final"] = final
    write_json(path / "result.json", result)
    for file in ("last.pt", "best.pt"):
        (path / file).unlink(missing_ok=True)
    return result


def curve_of(log, tokens_per_step):
    """[[tokens read, validation losses ...]] of a training log."""
    losses = {}
    for row in read_rows(log, dict(step=int), "train again"):
        if "val" in row:
            losses[row["step"]] = row["val"].values()  # after a restart: the last
    return [[step * tokens_per_step, *losses[step]] for step in sorted(losses)]


# -- Measuring --------------------------------------------------------------------------------


@torch.inference_mode()
def measure(model, cfg, run):
    """Losses on the validation text: of all tokens, and of the values at their first and at later
    mentions. {condition: [all, first, later]}, in nats a token.

    Conditions: plain (no header), nothing recalled, memories, those that the chunk before recalled
    (query_shift 1: they cannot tell of whom the chunk will speak); for two arms the memories also
    in bfloat16 and quantized (Table 7.1).
    """
    torch.manual_seed(0)  # for random tokens
    cfg = train.TrainConfig(**(vars(cfg) | dict(stage="explicit")))  # plain models are asked, too
    windows = train.Windows(cfg, "val", model.config)
    batch = windows.batch(range(windows.n))
    tokens, targets, references, recall = (x.to(model.device) for x in batch)
    windows.shift = 1
    before = windows.batch(range(windows.n))[3].to(model.device)
    pool = memory.Memories.cat([model.write(part) for part in references.split(512)])
    conditions = {
        "plain": (None, recall),
        "nothing recalled": (pool, torch.full_like(recall, -1)),
        "memories": (pool, recall),
        "memories, shift 1": (pool, before),
    }
    if run["arm"] in (BASE, "plain then explicit"):
        rounded = memory.Memories(pool.kv.bfloat16().float(), pool.count)
        conditions["bfloat16"] = (rounded, recall)
        conditions["quantized"] = (quantized(model, windows, pool), recall)
    first, later = mentions(batch[0].numpy())
    result = {}
    for name, (kept, table) in conditions.items():
        nats = nats_of(model, tokens, targets, kept, table)  # (n, T - 1)
        means = [nats.mean(), nats[first].mean(), nats[later].mean()]
        result[name] = [round(float(x), 4) for x in means]
    return result


def quantized(model, windows, pool):
    """The pool through a codec that was trained on memories of people known from training."""
    n = min(2048, len(windows.references) // 2)
    known = model.write(windows.references.batch(range(n)).to(model.device))
    codec = Codec.train(known.kv.cpu().flatten(0, -2))
    kv = codec.decode(codec.encode(pool.kv)).to(pool.kv)
    return memory.Memories(kv, pool.count)


def nats_of(model, tokens, targets, pool, table, size=64):
    """-log p (n, T - 1) of tokens 1, 2 ... of all windows. Row i*c + j of the pool is written from
    what chunk j of window i retrieved."""
    n_chunks = T // C
    nats = []
    for i in range(0, len(tokens), size):
        part = slice(i, i + size)
        memories = pool
        if pool is not None:  # the memories of these windows alone
            memories = pool[i * n_chunks : (i + size) * n_chunks]
        rows = torch.where(table[part] >= 0, table[part] - i * n_chunks, -1)
        logits, _ = model(tokens[part], memories=memories, recall=rows)
        log_p = logits.float().log_softmax(-1)[:, :-1]  # (size, T - 1, V)
        log_p = log_p.gather(-1, targets[part, :-1, None])  # (size, T - 1, 1)
        nats.append(-log_p.squeeze(-1).cpu())
    return torch.cat(nats)


def mentions(tokens):
    """Two masks (n, T - 1) over tokens 1, 2 ...: values said the first time, and again."""
    first = np.zeros((len(tokens), T - 1), bool)
    later = np.zeros((len(tokens), T - 1), bool)
    for row, text in enumerate(tokens):
        said = set()
        for at in range(4, T, 4):
            fact = tuple(text[at - 3 : at + 1])
            mask = later if fact in said else first
            mask[row, at - 1] = True
            said.add(fact)
    return torch.from_numpy(first), torch.from_numpy(later)


# -- All of them, the tables, the picture -----------------------------------------------------


def run_all(out, jobs, device="auto", quick=False):
    """Prepares the text and does both waves, `jobs` runs side by side. -> {name: result}."""
    data = Path(out) / "data"
    if not (data / "train.neighbors.bin").exists():
        shutil.rmtree(data, ignore_errors=True)
        if quick:
            prepare(data, 40, 8, people=300, held_out=100)
        else:
            prepare(data, 48_000, 256)
    waves = plan(quick)
    n_runs = sum(len(wave) for wave in waves)
    each = partial(do, out=out, device=device, quick=quick)
    results = {}
    started = time.time()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for wave in waves:
            for name, result in zip(wave, pool.map(each, wave.values(), wave), strict=True):
                results[name] = result
                minutes = (time.time() - started) / 60
                loss = result["curve"][-1][1]
                done = f"{len(results)}/{n_runs}  {name}: loss {loss:.4f}  {minutes:.1f} min"
                print(done, flush=True)
    return results


def save(results, path):
    """The JSON, a line a run; curves only where they are drawn."""
    lines = []
    for name, result in results.items():
        if name.startswith("choice"):
            result = {k: v for k, v in result.items() if k != "curve"}
        lines.append(f"{json.dumps(name)}: {json.dumps(result)}")
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    replace_file(path, lambda f: f.write(text.encode()))


def by_arm(results, choices):
    """{arm: {seed: result}} of the runs with one choice changed, or of the others."""
    arms = {}
    for name, result in results.items():
        if name.startswith("choice") == choices:
            arms.setdefault(result["arm"], {})[result["seed"]] = result
    return arms


def spread(values, digits=2):
    """The mean, and the lowest and highest of the seeds."""
    values = list(values)
    mean = f"{np.mean(values):.{digits}f}"
    low = f"{min(values):.{digits}f}"
    high = f"{max(values):.{digits}f}"
    return f"{mean} [{low}, {high}]"


COLUMNS = ("loss, no memory", "loss, memories")
COLUMNS += ("first mentions, no memory", "first mentions, memories")


def head(*cells):
    """The first two lines of a table in Markdown."""
    return ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]


def cells(runs, columns):
    """[spread over the runs] for each column (condition, number of the loss)."""
    return [spread(r["final"][how][i] for r in runs.values()) for how, i in columns]


def tables(results):
    """Markdown: the arms, and one change at a time. Nats; mean and [lowest, highest] of seeds.

    Differences are taken seed by seed: the seeds begin with the same weights, read the same text.
    """
    lines = arms_table(by_arm(results, choices=False))
    arms = by_arm(results, choices=True)
    if BASE in arms:
        lines += ["", *choices_table(arms)]
    return "\n".join(lines)


def arms_table(arms):
    more = ("first mentions, memories, shift 1", "later mentions, as trained")
    lines = head("arm", *COLUMNS, *more, "loss as trained, minus plain's")
    for arm, runs in arms.items():
        explicit = next(iter(runs.values()))["stage"] == "explicit"
        none = "nothing recalled" if explicit else "plain"
        own = "memories" if explicit else "plain"  # what the arm was trained with
        columns = [(none, 0), ("memories", 0), (none, 1), ("memories", 1)]
        columns += [("memories, shift 1", 1), (own, 2)]
        plain = arms["plain then plain" if "then" in arm else "plain"]
        gains = []
        for seed, result in runs.items():
            gains.append(result["final"][own][0] - plain[seed]["final"]["plain"][0])
        row = [arm, *cells(runs, columns), spread(gains, 3)]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def choices_table(arms):
    lines = head("one change", *COLUMNS, "loss, memories, minus the first row's")
    base = arms[BASE]
    rows = [(arm, runs, "memories") for arm, runs in arms.items()]
    rows += [(f"{how} memories, not trained with", base, how) for how in REDUCED]
    for label, runs, have in rows:
        none = "nothing recalled"
        columns = [(none, 0), (have, 0), (none, 1), (have, 1)]
        differences = []
        for seed, result in runs.items():
            differences.append(result["final"][have][0] - base[seed]["final"]["memories"][0])
        row = [label, *cells(runs, columns), spread(differences, 3)]
        lines.append("| " + " | ".join(row) + " |")
    return lines


COLOURS = {
    "plain": "tab:blue",
    "explicit": "tab:green",
    "plain then plain": "tab:blue",
    "explicit then explicit": "tab:green",
    "plain then explicit": "tab:red",
}


def draw(results, path):
    """Fig. 3.3: validation loss over the tokens of each plot; bands span the seeds."""
    Figure = optional("matplotlib.figure").Figure
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, runs in by_arm(results, choices=False).items():
        ax = right if " then " in arm else left
        curves = np.array([result["curve"] for result in runs.values()])  # (seeds, points, 2 or 3)
        tokens = curves[0, :, 0] / 1e6
        line = dict(color=COLOURS[arm], lw=1.6)
        band = dict(color=COLOURS[arm], alpha=0.15, lw=0)
        loss = curves[..., 1]
        with_memories = curves.shape[2] == 3
        label = f"{arm}, with memories" if with_memories else arm
        ax.plot(tokens, loss.mean(0), "-", label=label, **line)
        ax.fill_between(tokens, loss.min(0), loss.max(0), **band)
        if with_memories:
            loss = curves[..., 2]
            ax.plot(tokens, loss.mean(0), "--", label=f"{arm}, nothing recalled", **line)
            ax.fill_between(tokens, loss.min(0), loss.max(0), **band)
    legend = dict(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    for ax, title in (left, "From scratch"), (right, "Continued from the left plot"):
        ax.set(title=title, xlabel="million tokens read", ylabel="validation loss, nats a token")
        ax.grid(alpha=0.3)
        ax.set_xlim(0)
        ax.legend(fontsize=8, frameon=False, **legend)
    low = min(r["curve"][-1][1] for r in results.values() if "curve" in r)
    left.set_ylim(low - 0.05, low + 1.2)  # the first steps are the same for all, far above
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    p.add_argument("--out", help="runs and their text (None: out/two_stages, or ..._quick)")
    jobs = number(int, 1)
    p.add_argument("--jobs", type=jobs, default=2, help="runs side by side, a thread each (GPU: 1)")
    p.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one")
    p.add_argument("--quick", action="store_true", help="one seed, two or three steps a run")
    p.add_argument("--table", action="store_true", help="only the tables, from the JSON")
    p.add_argument("--json", help="the results (None: experiments/results/two_stages.json)")
    p.add_argument("--png", help="the picture (None: pictures/two_stages.png)")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    if args.out is None:
        args.out = "out/two_stages_quick" if args.quick else "out/two_stages"
    home = Path(args.out) if args.quick else HERE / "results"
    pictures = Path(args.out) if args.quick else HERE.parent / "pictures"
    file = Path(args.json or home / "two_stages.json")
    png = args.png or pictures / "two_stages.png"
    if args.table:
        print(tables(read_json(file, {}, "run this without --table")))
        return
    results = run_all(args.out, args.jobs, args.device, args.quick)
    save(results, file)
    print(tables(results))
    draw(results, png)


if __name__ == "__main__":
    run(main)
