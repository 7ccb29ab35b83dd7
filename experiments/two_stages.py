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
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import corpus  # noqa: E402
import memory  # noqa: E402
import model as decoder  # noqa: E402
import retrieval  # noqa: E402
import train  # noqa: E402
from common import UserError, optional, replace_file, run, write_json  # noqa: E402
from quantize import Codec  # noqa: E402

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
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    names = rng.permutation([a + b for a in syllables for b in syllables])
    n, R = 128, len(RELATIONS)  # first names, and last names; relations
    values = [w + rng.choice(syllables) for w in names[2 * n : 2 * n + R * VALUES]]
    words = [*names[: 2 * n], *RELATIONS, *values]
    vocab = ["Reference", ":", *(f" {w}" for w in words)]
    ranks = [base64.b64encode(w.encode()).decode() for w in vocab]  # every word is one token
    name = dict(name="people", pattern=r" ?\w+|:", prefix_space=True)
    write_json(out / "tokenizer.json", dict(name, ranks=ranks))
    tok = corpus.tokenizer(out)

    who = rng.permutation(n * n)[:people]  # a first and a last name together are one person's
    facts = np.empty((people, R, 4), int)
    facts[..., 0], facts[..., 1] = 2 + who[:, None] // n, 2 + n + who[:, None] % n
    facts[..., 2] = 2 + 2 * n + np.arange(R)
    facts[..., 3] = 2 + 2 * n + R + np.arange(R) * VALUES + rng.integers(VALUES, size=(people, R))
    order = rng.permuted(np.tile(np.arange(R), (people, 1)), axis=1)
    texts = [f[o].ravel() for f, o in zip(facts, order, strict=True)]
    references = corpus.References.create(out / "kb", texts, tok.n_vocab)
    known = people - held_out
    for split, low, high, size in ("train", 0, known, rows), ("val", known, people, val_rows):
        doc = documents(facts, low, high, size, rng)
        doc = np.concatenate([np.full((size, 1), tok.bos), doc], 1)[:, :T]
        corpus.write_tokens(out / f"{split}.bin", doc, tok.n_vocab)
    meta = dict(name="people", tokenizer=str(out), tokenizer_id=tok.id, n_vocab=tok.n_vocab)
    write_json(out / "meta.json", meta)
    found = retrieval.Retriever.build(out / "kb.index", references, out)
    for split in "val", "train":
        tokens, path = corpus.open_tokens(out, split), out / f"{split}.neighbors.bin"
        retrieval.write_neighbors(path, tokens, C, references, found, 1, context=T)


def documents(facts, low, high, size, rng, people=3, stay=0.6):
    """(size, T) tokens: facts of three people each, one person's after another's by chance."""
    cast = rng.integers(low, high, size=(size, people))
    rows, at, each = np.empty((size, T // 4, 4), int), np.zeros(size, int), np.arange(size)
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
    first, second = (3, 2) if quick else (1200, 400)  # paper: 60 and 22 billion tokens
    shorter = 2 if quick else 150  # of the runs with one choice changed
    left, right = {}, {}
    seeds = SEEDS[:1] if quick else SEEDS
    for arm, stage in ("explicit", "explicit"), ("plain", "implicit"):  # the longest first
        for seed in seeds:
            left[f"{arm}-{seed}"] = dict(arm=arm, seed=seed, stage=stage, steps=first)
    for seed in seeds:
        for before, after in ("explicit", "explicit"), ("plain", "explicit"), ("plain", "plain"):
            arm, stage = f"{before} then {after}", "explicit" if after == "explicit" else "implicit"
            right[f"{before}-{after}-{seed}"] = dict(
                arm=arm, seed=seed, stage=stage, steps=second, init=f"{before}-{seed}"
            )
    L, Lm = SHAPE["n_layer"], SHAPE["n_memory_layer"]
    choices = {BASE: {}}
    choices |= {f"S = {s}": dict(memory_tokens=s) for s in (1, 2, 4, 16)}
    choices |= {f"Lm = {n}": dict(n_memory_layer=n) for n in (L // 4, L // 2, L) if n != Lm}
    choices |= {f"R = {r}": dict(n_recall=r) for r in (1, 3, 10)}
    choices |= {"approximate weights": dict(approximate_weights=True)}
    choices |= {f"{how} tokens": how for how in SELECT}
    for seed in seeds:
        for choice, change in choices.items():
            run = dict(arm=choice, seed=seed, stage="explicit", steps=shorter, init=f"plain-{seed}")
            run |= dict(select=change) if isinstance(change, str) else dict(changes=change)
            key = "base" if choice == BASE else choice.replace(" ", "")
            right[f"choice-{key}-{seed}"] = run
    return left, right


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
        result = json.loads((path / "result.json").read_text())
        if not run.items() <= result.items():
            raise UserError(f"{path} is a run of other settings: remove it, or give another --out")
        return result
    path.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # two runs side by side are faster than one on two threads
    data, stage, init = f"{out}/data", run["stage"], run.get("init", "")
    tok = corpus.tokenizer(data)
    shape = SHAPE | run.get("changes", {})
    config = decoder.Config(**shape, vocab_size=tok.n_vocab, header=tuple(tok.header))
    every = 1 if quick else run["steps"] if name.startswith("choice") else 50
    cfg = train.TrainConfig(
        data=data,
        stage=stage,
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
        eval_every=every,
        save_every=100,
        device=device,
    )
    started = time.time()
    decoder.keep_tokens = SELECT.get(run.get("select"), memory.keep_tokens)
    try:
        with open(path / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            model = train.main(cfg, config)["model"]
        rows = [json.loads(line) for line in open(path / "log.jsonl")]
        rows = {r["step"]: r["val"] for r in rows if "val" in r}  # after a restart: the last
        per_step = cfg.batch * T
        curve = [[step * per_step, *rows[step].values()] for step in sorted(rows)]
        final = measure(model.eval(), cfg, run)
    finally:
        decoder.keep_tokens = memory.keep_tokens
    seconds = round(time.time() - started)
    result = dict(run, tokens=run["steps"] * per_step, seconds=seconds, curve=curve, final=final)
    write_json(path / "result.json", result)
    for file in ("last.pt", "best.pt"):
        (path / file).unlink(missing_ok=True)
    return result


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
    windows, c = train.Windows(cfg, "val", model.config), T // C
    tokens, targets, references, recall = windows.batch(range(windows.n))
    windows.shift = 1
    before = windows.batch(range(windows.n))[3]
    first, later = mentions(tokens.numpy())
    to = partial(torch.Tensor.to, device=model.device)
    pool = memory.Memories.cat([model.write(to(r)) for r in references.split(512)])
    conditions = {"plain": (None, recall), "nothing recalled": (pool, torch.full_like(recall, -1))}
    conditions |= {"memories": (pool, recall), "memories, shift 1": (pool, before)}
    if run["arm"] in (BASE, "plain then explicit"):
        n = min(2048, len(windows.references) // 2)  # of people known from training
        known = model.write(to(windows.references.batch(range(n))))
        codec = Codec.train(known.kv.cpu().flatten(0, -2))
        kv = codec.decode(codec.encode(pool.kv)).to(pool.kv)
        half = memory.Memories(pool.kv.bfloat16().float(), pool.count)
        conditions |= {"bfloat16": (half, recall), "quantized": (replace(half, kv=kv), recall)}
    result = {}
    for name, (kept, table) in conditions.items():
        nats = []
        for i in range(0, windows.n, 64):  # windows i .. i+63 read rows i*c .. of the pool
            part, mine = slice(i, i + 64), kept and kept[i * c : (i + 64) * c]
            rows = torch.where(table[part] >= 0, table[part] - i * c, -1)
            logits, _ = model(to(tokens[part]), memories=mine, recall=to(rows))
            log_p = logits.float().log_softmax(-1)[:, :-1]
            nats.append(-log_p.gather(-1, to(targets[part, :-1, None])).squeeze(-1).cpu())
        nats = torch.cat(nats)  # (n, T - 1): of token 1, 2 ...
        result[name] = [round(float(x.mean()), 4) for x in (nats, nats[first], nats[later])]
    return result


def mentions(tokens):
    """Two masks (n, T - 1) over tokens 1, 2 ...: values said the first time, and again."""
    first, later = np.zeros((2, len(tokens), T - 1), bool)
    for row, text in enumerate(tokens):
        said = set()
        for at in range(4, T, 4):
            fact = tuple(text[at - 3 : at + 1])
            (later if fact in said else first)[row, at - 1] = True
            said.add(fact)
    return torch.from_numpy(first), torch.from_numpy(later)


# -- All of them, the tables, the picture -----------------------------------------------------


def run_all(out, jobs, device="auto", quick=False):
    """Prepares the text and does both waves, `jobs` runs side by side. -> {name: result}."""
    data = Path(out) / "data"
    if not (data / "train.neighbors.bin").exists():
        shutil.rmtree(data, ignore_errors=True)
        prepare(data, *((40, 8, 300, 100) if quick else (48_000, 256)))
    results, started, waves = {}, time.time(), plan(quick)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for wave in waves:
            each = partial(do, out=out, device=device, quick=quick)
            for name, result in zip(wave, pool.map(each, wave.values(), wave), strict=True):
                results[name] = result
                done = f"{len(results)}/{sum(map(len, waves))}"
                loss, minutes = result["curve"][-1][1], (time.time() - started) / 60
                print(f"{done}  {name}: loss {loss:.4f}  {minutes:.1f} min", flush=True)
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
    mean, low, high = (f"{x:.{digits}f}" for x in (np.mean(values), min(values), max(values)))
    return f"{mean} [{low}, {high}]"


COLUMNS = ("loss, no memory", "loss, memories")
COLUMNS += ("first mentions, no memory", "first mentions, memories")


def tables(results):
    """Markdown: the arms, and one change at a time. Nats; mean and [lowest, highest] of seeds.

    Differences are taken seed by seed: the seeds begin with the same weights, read the same text.
    """

    def row(first, runs, *columns):
        cells = (spread(r["final"][how][i] for r in runs.values()) for how, i in columns)
        return "| " + " | ".join([first, *cells])

    def head(*names):
        return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]

    arms = by_arm(results, choices=False)
    more = "first mentions, memories, shift 1", "later mentions, as trained"
    lines = head("arm", *COLUMNS, *more, "loss as trained, minus plain's")
    for arm, runs in arms.items():
        plain = arms["plain then plain" if "then" in arm else "plain"]
        explicit = next(iter(runs.values()))["stage"] == "explicit"
        none, have = "nothing recalled" if explicit else "plain", "memories"
        own = have if explicit else none
        columns = (none, 0), (have, 0), (none, 1), (have, 1), ("memories, shift 1", 1), (own, 2)
        gain = [r["final"][own][0] - plain[s]["final"]["plain"][0] for s, r in runs.items()]
        lines.append(row(arm, runs, *columns) + f" | {spread(gain, 3)} |")
    arms = by_arm(results, choices=True)
    if BASE not in arms:
        return "\n".join(lines)
    lines += ["", *head("one change", *COLUMNS, "loss, memories, minus the first row's")]
    base = arms[BASE]

    def compare(label, runs, have):
        pairs = [r["final"][have][0] - base[s]["final"]["memories"][0] for s, r in runs.items()]
        none = "nothing recalled"
        columns = (none, 0), (have, 0), (none, 1), (have, 1)
        return row(label, runs, *columns) + f" | {spread(pairs, 3)} |"

    lines += [compare(arm, runs, "memories") for arm, runs in arms.items()]
    lines += [compare(f"{how} memories, not trained with", base, how) for how in REDUCED]
    return "\n".join(lines)


def draw(results, path):
    """Fig. 3.3: validation loss over the tokens of each plot; bands span the seeds."""
    optional("matplotlib").use("Agg")
    pyplot = optional("matplotlib.pyplot")
    colours = {"plain": "tab:blue", "explicit": "tab:green", "plain then plain": "tab:blue"}
    colours |= {"explicit then explicit": "tab:green", "plain then explicit": "tab:red"}
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for arm, runs in by_arm(results, choices=False).items():
        curves = np.array([r["curve"] for r in runs.values()])  # (seeds, points, 2 or 3)
        ax, x = axes[int(" then " in arm)], curves[0, :, 0] / 1e6
        labels, styles = [arm, f"{arm}, nothing recalled"], ["-", "--"]
        if curves.shape[2] == 3:
            labels[0] += ", with memories"
        for i in range(1, curves.shape[2]):
            y, label, style = curves[..., i], labels[i - 1], styles[i - 1]
            ax.plot(x, y.mean(0), style, color=colours[arm], label=label, lw=1.6)
            ax.fill_between(x, y.min(0), y.max(0), color=colours[arm], alpha=0.15, lw=0)
    for ax, title in zip(axes, ("From scratch", "Continued from the left plot"), strict=True):
        ax.set(title=title, xlabel="million tokens read", ylabel="validation loss, nats a token")
        ax.grid(alpha=0.3)
        ax.set_xlim(0)
        ax.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, fontsize=8, frameon=False
        )
    low = min(r["curve"][-1][1] for r in results.values() if "curve" in r)
    axes[0].set_ylim(low - 0.05, low + 1.2)  # the first steps are the same for all, far above
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--out", help="runs and their text (default: out/two_stages, or ..._quick)")
    p.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each (GPU: 1)")
    p.add_argument("--device", default="auto", help="cuda where there is one")
    p.add_argument("--quick", action="store_true", help="one seed, two or three steps a run")
    p.add_argument("--table", action="store_true", help="only the tables, from the JSON")
    p.add_argument("--json", help="the results (default: experiments/results/two_stages.json)")
    p.add_argument("--png", help="the picture (default: pictures/two_stages.png)")
    args = p.parse_args(argv)
    args.out = args.out or "out/two_stages" + "_quick" * args.quick
    home = Path(args.out) if args.quick else HERE / "results"
    picture = Path(args.out) if args.quick else HERE.parent / "pictures"
    file, png = args.json or home / "two_stages.json", args.png or picture / "two_stages.png"
    if args.table:
        if not Path(file).exists():
            raise UserError(f"{file} is missing: run this without --table")
        print(tables(json.loads(Path(file).read_text())))
        return
    results = run_all(args.out, args.jobs, args.device, args.quick)
    save(results, file)
    print(tables(results))
    draw(results, png)


if __name__ == "__main__":
    run(main)
