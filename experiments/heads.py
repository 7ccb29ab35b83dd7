"""Which heads need memories (sec. 3.3, Remark 3.3): a quarter of the bytes without training again.

    python experiments/heads.py --shares 1 2 4 8

All key-value heads of the memory layers keep tokens and read memories (the paper's choice). Here
the questions of eval.py are asked again with memories for some of these heads; the others attend to
header and context alone (Config.memory_heads: the bank of such a model has fewer bytes). The
heads to keep are chosen one by one on one half of the facts, each time the one that lowers the nats
most, and judged on the other half, beside as many at random. A second way to choose is the paper's
(Remark 3.3): with the references as text in the context, one head at a time sees only the --window
tokens before it and the BOS; the heads whose loss hurts most come first.

All chunks of an answer read the memories that its question recalled.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import check, number, run
from eval import Asker, columns, every_wording, find_rows, json_flag, prepare_json, write_result
from generate import model_flags, open_memory, open_model, pool_of
from memory import Memories, causal_attention
from model import rope_table

# -- A forward with one head that does not see what is far away ------------------------------------


def near_forward(model, tokens, layer, head, window):
    """Logits (B, T, V) of the plain decoder, where one key-value head sees only the BOS and the
    `window` tokens up to each."""
    cfg = model.config
    group = cfg.n_head // cfg.n_kv_head
    n = tokens.shape[1]
    at = torch.arange(n, device=tokens.device)
    cos, sin = rope_table(at, cfg)
    back = at[:, None] - at  # (T, T): how far back a key lies
    near = (back >= 0) & ((back < window) | (at == 0))
    queries = slice(head * group, (head + 1) * group)

    def attend(l, q, k, v):
        y = causal_attention(q, k, v)  # (B, H, T, dh)
        if l == layer:
            y = y.clone()
            keys = k[:, head : head + 1].expand(-1, group, -1, -1)  # (B, G, T, dh)
            values = v[:, head : head + 1].expand(-1, group, -1, -1)
            y[:, queries] = F.scaled_dot_product_attention(q[:, queries], keys, values, near)
        return y, None

    x = model.embed(tokens)  # (B, T, d)
    for l in range(cfg.n_layer):
        x, _ = model._layer(l, x, attend, cos, sin)
    return model.head(model.norm(x))


# -- Asking ---------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Answers that are followed token by token: tokens (B, T), padded at the end with 0.

    start, end (B,): where the answer stands. fact, sentence (B,): whose it is."""

    tokens: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    row: list
    pool: Memories = None
    table: torch.Tensor = None


def batches(asker, rows, condition, size=64):
    """The answers of all rows, sorted by length, with the memories that each question recalls."""
    answers = []
    for i, row in enumerate(rows):
        prompt = asker.prompt(row, condition)
        for sentence in row["sentences"] or [f" {row['answer']}"]:
            answers.append((i, prompt, asker.tokenizer.encode(sentence)))
    answers.sort(key=length_of)
    cfg = asker.model.config
    result = []
    for at in range(0, len(answers), size):
        part = answers[at : at + size]
        texts = [torch.tensor([*prompt, *answer]) for _, prompt, answer in part]
        tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # (B, T)
        start = torch.tensor([len(prompt) for _, prompt, _ in part])
        end = torch.tensor([len(text) for text in texts])
        batch = Batch(tokens, start, end, [i for i, _, _ in part])
        if condition == "recalled":
            queries = [prompt[-cfg.chunk_len :] for _, prompt, _ in part]
            ids = asker.retriever.search(queries, cfg.n_recall)[0]  # (B, R)
            batch.pool, table = pool_of(asker.bank, ids, asker.model)
            # a bank's buffer is used again, so this pool keeps its own copy
            batch.pool = Memories(batch.pool.kv.clone(), batch.pool.count.clone())
            n_chunks = -(-tokens.shape[1] // cfg.chunk_len)
            batch.table = table[:, None].expand(-1, n_chunks, -1)  # (B, c, R)
        result.append(batch)
    return result


def length_of(answer):
    return len(answer[1]) + len(answer[2])


@torch.inference_mode()
def score(parts, logits_of, n_rows):
    """-> exact (n,) bool and nats (n,) of each row; logits_of(batch) -> logits (B, T, V)."""
    exact = np.zeros(n_rows, bool)
    logp = np.full(n_rows, -np.inf)
    for batch in parts:
        logits = logits_of(batch)[:, :-1].float()  # (B, T-1, V): of tokens 1, 2 ...
        targets = batch.tokens[:, 1:].to(logits.device)  # (B, T-1)
        at = torch.arange(1, batch.tokens.shape[1])
        answer = (at >= batch.start[:, None]) & (at < batch.end[:, None])  # (B, T-1)
        each = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].cpu()  # (B, T-1)
        likeliest = (logits.argmax(-1) == targets).cpu() | ~answer  # (B, T-1)
        total = (each * answer).sum(1).tolist()
        for i, p, right in zip(batch.row, total, likeliest.all(1).tolist(), strict=True):
            logp[i] = np.logaddexp(logp[i], p)  # of all sentences that give the answer
            exact[i] = exact[i] or right
    return exact, -logp


class Heads:
    """Questions asked with memories for some heads. A head is a pair (layer, key-value head)."""

    def __init__(self, asker, rows):
        self.model = asker.model
        self.cfg = asker.model.config
        self.rows = rows
        self.parts = batches(asker, rows, "recalled")
        self.all = []
        for i in range(self.cfg.n_memory_layer):
            self.all += [(i, head) for head in range(self.cfg.n_kv_head)]

    def ask(self, heads):
        """-> exact (n,), nats (n,) where only these heads keep and read memories."""
        model = self.model
        nothing = Memories.empty(self.cfg, device=model.device)
        some = replace(self.cfg, memory_heads=names(heads, self.cfg) or "all")

        def logits_of(batch):
            tokens = batch.tokens.to(model.device)
            if not heads:
                return model(tokens, memories=nothing)[0]
            return model(tokens, memories=batch.pool, recall=batch.table)[0]

        model.config = some
        result = score(self.parts, logits_of, len(self.rows))
        model.config = self.cfg
        return result


def best_first(heads, most, at_once=1):
    """The heads that help most: those that lower the nats of these questions the most beside the
    ones chosen before. at_once: how many join them before all others are tried again."""
    chosen = []
    left = list(heads.all)
    with tqdm(total=most, desc="choosing heads", leave=False) as bar:
        while len(chosen) < most:
            nats = [heads.ask([*chosen, head])[1].mean() for head in left]
            order = np.argsort(nats, kind="stable")[: min(at_once, most - len(chosen))]
            found = [left[i] for i in order]
            chosen += found
            left = [head for head in left if head not in found]
            bar.update(len(found))
    return chosen


def by_distance(asker, rows, window):
    """Remark 3.3: the heads, first the one whose loss of the distant tokens costs most nats.

    Measured with the references as text in the context."""
    model = asker.model
    cfg = model.config
    parts = batches(asker, rows, "rag", size=16)
    cost = {}
    for i in tqdm(range(cfg.n_memory_layer), "masking heads", leave=False):
        for head in range(cfg.n_kv_head):
            layer = cfg.memory_layers[i]

            def logits_of(batch, layer=layer, head=head):
                return near_forward(model, batch.tokens.to(model.device), layer, head, window)

            cost[i, head] = score(parts, logits_of, len(rows))[1].mean()
    return sorted(cost, key=cost.get, reverse=True)


def halves(rows, seed):
    """Two halves of the facts, each with all its wordings."""
    facts = sorted({row["fact"] for row in rows})
    order = np.random.default_rng(seed).permutation(facts).tolist()
    first = set(order[: len(order) // 2])
    return [r for r in rows if r["fact"] in first], [r for r in rows if r["fact"] not in first]


def names(heads, cfg):
    """The heads as --memory_heads writes them: layer.head."""
    return ",".join(f"{cfg.memory_layers[i]}.{head}" for i, head in sorted(heads))


# -- Command line ---------------------------------------------------------------------------------


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    model_flags(p)
    size = number(int, 1)
    p.add_argument("--shares", type=size, nargs="+", default=[1, 2, 4, 8], help="heads to keep")
    p.add_argument("--questions", type=size, default=400, help="how many facts to ask for")
    p.add_argument("--questions_file", help="other questions than DATA/questions.jsonl")
    p.add_argument("--random", type=number(int, 0), default=3, help="random choices of each size")
    p.add_argument("--window", type=size, default=32, help="nearest tokens of Remark 3.3")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of halves and random choices")
    json_flag(p)
    return p


def main(argv=None):
    a = parser().parse_args(argv)
    prepare_json(a)
    model, tokenizer = open_model(
        a.checkpoint, a.data, a.device, n_recall=a.n_recall, verify=not a.no_verify
    )
    references, retriever, bank = open_memory(a, model)
    rows = every_wording(find_rows(a, references, tokenizer))
    asker = Asker(model, tokenizer, references, retriever, bank)
    to_choose, to_judge = halves(rows, a.seed)
    check(to_choose, "--questions: give two or more, to choose by and to judge by")
    print(f"{len(rows)} questions: {len(to_choose)} to choose by, {len(to_judge)} to judge by")
    cfg = model.config
    judges = Heads(asker, to_judge)
    n_heads = len(judges.all)
    shares = sorted({n for n in a.shares if n < n_heads})
    check(shares, f"--shares: there are {n_heads} heads in the memory layers; keep fewer")
    best = best_first(Heads(asker, to_choose), max(shares))
    distant = by_distance(asker, to_choose, a.window)
    rng = np.random.default_rng(a.seed)
    record = bank.record_bytes // n_heads  # bytes a head
    table = []

    def judge(name, kept):
        exact, nats = judges.ask(kept)
        row = dict(choice=name, heads=names(kept, cfg), bytes=record * len(kept))
        row["exact"] = float(exact.mean())
        row["nats"] = float(nats.mean())
        table.append(row)

    judge(f"all {n_heads}", judges.all)
    for n in shares:
        judge(f"best {n}", best[:n])
        judge(f"{n} by distant tokens (Remark 3.3)", distant[:n])
        for _ in range(a.random):
            some = rng.choice(n_heads, n, replace=False)
            judge(f"{n} at random", [judges.all[i] for i in some])
    judge("none", [])

    single = {}
    for head in judges.all:
        without = [other for other in judges.all if other != head]
        exact, nats = judges.ask(without)
        alone_exact, alone_nats = judges.ask([head])
        single[names([head], cfg)] = dict(
            nats_without=float(nats.mean()),
            exact_without=float(exact.mean()),
            nats_alone=float(alone_nats.mean()),
            exact_alone=float(alone_exact.mean()),
        )
    result = dict(questions=len(rows), heads=n_heads, choices=table, single=single)
    print("\n" + tables(result))
    write_result(a, result)
    return result


def spread(rows, key, digits):
    """The mean of several rows, and the lowest and highest; of one row its number."""
    values = [row[key] for row in rows]
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def choices_table(rows):
    """Markdown; random choices of one size are one row: mean [lowest, highest]."""
    by_choice = {}
    for row in rows:
        by_choice.setdefault(row["choice"], []).append(row)
    lines = [["memories for", "exact", "nats per answer", "bytes per reference", "layer.head"]]
    for choice, alike in by_choice.items():
        few = len(alike) == 1 and not choice.startswith("all")
        heads = alike[0]["heads"].replace(",", " ") if few else ""
        size = f"{alike[0]['bytes']:,}"
        lines.append([choice, spread(alike, "exact", 3), spread(alike, "nats", 2), size, heads])
    return columns(*lines)


def tables(result):
    """Both tables in Markdown: of the choices, and of each head by itself."""
    singles = [["layer.head", "exact without it", "nats", "exact with it alone", "nats"]]
    for name, x in result["single"].items():
        cells = [f"{x['exact_without']:.3f}", f"{x['nats_without']:.2f}"]
        singles.append([name, *cells, f"{x['exact_alone']:.3f}", f"{x['nats_alone']:.2f}"])
    return choices_table(result["choices"]) + "\n\n" + columns(*singles)


if __name__ == "__main__":
    run(main)
