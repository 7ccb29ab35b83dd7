"""Training, both stages in one loop (sec. 3.6, 5).

    python train.py --preset toy --data data/cities --stage implicit --out out/implicit
    python train.py --init out/implicit --data data/cities --stage explicit --out out/toy
    python train.py --resume out/toy                      goes on where a stopped run left off

The stages differ in the batch and in nothing else. Implicit: windows of text, an ordinary decoder.
Explicit: the same, and each chunk of 64 tokens comes with the reference that retrieval found for
it; the model writes these into memories on the fly and chunk c reads those of chunks c-4..c. The
loss is over the text alone; its gradient reaches the writer through the kept keys and values.
"""

import argparse
import inspect
import json
import math
import re
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

import corpus
import cost
import retrieval
from common import UserError, check, find_device, replace_file, run, write_json
from memory import attention_path
from model import PRESETS, Config, Memory3, load_checkpoint


@dataclass
class TrainConfig:
    """What a run is. Every field is a flag: --steps 1000. Shapes of the model are flags too."""

    data: str = "data/cities"  # a prepared data set
    stage: str = "implicit"  # implicit | explicit
    split: str = ""  # training text; default: train, or explicit in the explicit stage
    val: str = ""  # validation splits, comma-separated; default: val,heldout of that stage
    out: str = "out/run"  # checkpoints and log.jsonl go here
    init: str = ""  # a checkpoint to start from: its weights, not its optimizer
    context: int = 256  # T, tokens of a window
    batch: int = 16  # windows of one step, whatever the hardware
    micro_batch: int = 0  # windows at a time (0 = batch): lower it when memory runs out
    steps: int = 1000  # of the optimizer, in all
    lr: float = 2e-3  # the highest; linear warmup, constant, linear decay to near zero
    warmup: int = 100  # steps
    decay: float = 0.1  # share of the steps that decay (sec. 5.1)
    weight_decay: float = 0.1  # on matrices (sec. 5.1)
    beta2: float = 0.95  # AdamW's; beta1 is 0.9
    grad_clip: float = 1.0  # largest norm of a gradient
    query_shift: int = 0  # 0: a chunk's own text retrieves for it (paper); 1: the chunk before it
    eval_every: int = 250  # steps between validations; the best of them is kept as best.pt
    eval_batches: int = 4  # micro-batches of each validation split
    save_every: int = 250  # steps between checkpoints (last.pt)
    keep_every: int = 0  # steps between copies that are kept as step_N.pt (weights only)
    back_off: float = 0.0  # > 0: on divergence, last checkpoint and lr times this (sec. 5.2)
    seed: int = 1  # of the weights and of the order of the windows
    device: str = "auto"  # cuda where there is one
    dtype: str = "auto"  # bfloat16 where the hardware has it, else float32
    compile: bool = False  # torch.compile: faster steps after a minute of waiting

    def __post_init__(self):
        explicit = self.stage == "explicit"
        check(explicit or self.stage == "implicit", f"--stage {self.stage}: implicit or explicit")
        known = self.dtype in ("auto", "float32", "bfloat16")
        check(known, f"--dtype {self.dtype}: auto, float32 or bfloat16")
        self.split = self.split or ("explicit" if explicit else "train")
        self.val = self.val or ("explicit_val,explicit_heldout" if explicit else "val,heldout")
        self.micro_batch = micro = self.micro_batch or self.batch
        for name in "context batch micro_batch steps eval_every eval_batches save_every".split():
            check(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: at least 1")
        check(0 <= self.decay <= 1, f"--decay {self.decay}: a share between 0 and 1")
        check(self.batch % micro == 0, f"--batch {self.batch}: no multiple of micro_batch {micro}")


# -- Batches ----------------------------------------------------------------------------------


class Windows:
    """The windows of a split, in a seeded order that depends on nothing but the position.

    tokens: the split; window i is [i*T, (i+1)*T). Its first token is overwritten by the BOS: the
    context begins with one in every format, and the grid of chunks stays that of the neighbours.
    neighbors (n_chunks, k) int32 and references: for the explicit stage, else None."""

    def __init__(self, cfg, split, config):
        self.T, self.C, self.bos = cfg.context, config.chunk_len, config.header[0]
        self.config, self.seed, self.shift = config, cfg.seed, cfg.query_shift
        self.tokens = corpus.open_tokens(cfg.data, split)
        self.n = len(self.tokens) // self.T
        check(self.n, f"{cfg.data}/{split}.bin is shorter than one window of {self.T}")
        self.neighbors = None
        if cfg.stage == "explicit":
            check(self.T % self.C == 0, f"--context {self.T} is no multiple of chunk_len {self.C}")
            self.neighbors, name = retrieval.open_neighbors(
                cfg.data, split, chunk_len=self.C, context=self.T
            )
            self.references = corpus.References.open(f"{cfg.data}/{name}")

    def window(self, position):
        """Which window stands at a position of the endless stream: epoch after epoch, shuffled."""
        epoch, i = divmod(position, self.n)
        if getattr(self, "epoch", None) != epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        return int(self.order[i])

    def batch(self, windows, full_width=False):
        """-> tokens (B, T), targets (B, T), references (B*c, n) and recall (B, c, R), or None."""
        T, B = self.T, len(windows)
        x = np.stack([self.tokens[w * T : (w + 1) * T] for w in windows]).astype(np.int64)  # (B, T)
        tokens = torch.from_numpy(x)
        targets = torch.cat([tokens[:, 1:], torch.full((B, 1), -1)], 1)  # -1: the next window's
        tokens[:, 0] = self.bos
        if self.neighbors is None:
            return tokens, targets, None, None
        c = T // self.C
        ids = np.stack([self.neighbors[w * c : (w + 1) * c, 0] for w in windows])  # (B, c)
        width = self.config.ref_len if full_width else None  # of one shape: torch.compile asks
        references = self.references.batch(np.maximum(ids, 0).ravel(), width)  # none: any, unread
        return tokens, targets, references, recall_table(ids, self.config.n_recall, self.shift)


def recall_table(ids, R, shift=0):
    """Which memories each chunk reads in training: those of chunks c-R+1..c (sec. 3.6).

    ids (B, c): the reference each chunk retrieved, -1 = none; pool row b*c + i is the memory of
    ids[b, i]. A reference that two of the chunks retrieved is read once. shift 1: a chunk's
    memories are retrieved by the chunk before it, as for generated chunks. Returns (B, c, R) int64.

    >>> recall_table(np.array([[7, 8, 8, -1]]), 2).tolist()
    [[[0, -1], [1, 0], [2, -1], [-1, 2]]]
    """
    B, c = ids.shape
    recall = np.full((B, c, R), -1)
    for b, i in np.ndindex(B, c):
        seen = {-1}  # -1: nothing was retrieved
        for r in range(R):
            j = i - shift - r
            if j >= 0 and ids[b, j] not in seen:
                seen.add(ids[b, j])
                recall[b, i, r] = b * c + j
    return torch.from_numpy(recall)


def loss_on(model, batch, device):
    """The loss of one batch; writes its references first, where it has any."""
    tokens, targets, references, recall = (t if t is None else t.to(device) for t in batch)
    memories = None if references is None else model.write(references)  # (B*c, Lm, 2, ...)
    return model(tokens, targets, memories, recall)[1]


# -- Schedule, optimizer, checkpoints ---------------------------------------------------------


def lr_at(step, cfg):
    """Warmup-stable-decay (sec. 5.1), as a share of cfg.lr.

    >>> cfg = TrainConfig(steps=100, warmup=10, decay=0.1)
    >>> [lr_at(s, cfg) for s in (0, 9, 50, 95, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.1]
    """
    left = (cfg.steps - step) / max(1.0, cfg.decay * cfg.steps)
    return min(1.0, (step + 1) / max(1, cfg.warmup), left)


def make_optimizer(model, cfg):
    """AdamW; weight decay on matrices only, not on norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors)]
    return torch.optim.AdamW(groups, cfg.lr, (0.9, cfg.beta2), weight_decay=0.0, fused=True)


def save_checkpoint(path, model, optimizer, meta):
    """One file, written beside and renamed; the optimizer (or None) is for what a run resumes."""
    state = dict(model=model.state_dict(), meta=meta)
    state |= dict(optimizer=optimizer.state_dict()) if optimizer else {}
    replace_file(path, lambda f: torch.save(state, f))  # a kill leaves the old one
    write_json(Path(path).parent / "meta.json", meta)


PEAK = dict(A100=312e12, A800=312e12, H100=989e12, H800=989e12, H200=989e12)  # bf16, FLOP/s

# -- The run ----------------------------------------------------------------------------------


def open_run(cfg, config):
    """(model, meta, optimizer's state or None) that the run begins with: those of its own last.pt,
    else the weights of cfg.init, else new ones."""
    # Random are only the first weights and the order of windows: seed and position give both.
    meta, last = dict(step=0, position=0, best=None, lr_scale=1.0), Path(cfg.out) / "last.pt"
    if last.exists():
        model, meta, state = load_checkpoint(last, with_optimizer=True)
        cure = "choose another --out"
        for name in ("stage", "data", "split", "init", "context", "batch", "query_shift", "seed"):
            was, now = meta["train"][name], getattr(cfg, name)
            check(was == now, f"{last} is of a run with --{name} {was}, not {now}: {cure}")
        check(config in (None, model.config), f"{last} is a model of another shape: {cure}")
        print(f"resuming {last} at step {meta['step']}")
        return model, meta, state
    if not cfg.init:
        return Memory3(config), meta, None
    model, before = load_checkpoint(cfg.init)
    print(f"starting from {cfg.init} ({before['stage']} stage, step {before['step']})")
    if config:  # the same weights, other memories: S, Lm, C ... can change between the stages
        weights, model = model.state_dict(), Memory3(config)
        model.load_state_dict(weights)
    return model, meta | dict(tokenizer=before.get("tokenizer")), None


def validate(model, splits, cfg, device, cast):
    """Mean loss over some windows of each split; in the explicit stage also with nothing recalled.
    splits: {name: Windows}. Returns {name: nats a token}, and prints it."""
    model.eval()
    result = {}
    for name, windows in splits.items():
        n = min(windows.n, cfg.eval_batches * cfg.micro_batch)
        for i in range(0, n, cfg.micro_batch):
            batch = windows.batch(range(i, min(n, i + cfg.micro_batch)))
            cases = {name: batch}
            if cfg.stage == "explicit":
                cases[f"{name}, nothing recalled"] = *batch[:3], torch.full_like(batch[3], -1)
            for case, inputs in cases.items():
                with torch.no_grad(), cast:
                    loss = loss_on(model, inputs, device).item()
                result[case] = result.get(case, 0) + loss * len(batch[0]) / n
    model.train()
    print("validation:", *(f"{k} {v:.4f}" for k, v in result.items()), sep="  ")
    return result


def main(cfg, config=None):
    """Trains; returns dict(model, losses, val, step). config: the model's shape; None = that of
    cfg.init. Resumes where cfg.out holds a last.pt of the same run."""
    torch.manual_seed(cfg.seed)
    device = find_device(cfg.device)
    # bfloat16 where hardware multiplies it (False: not emulated; CPU: AMX); else float32 is faster
    cuda, reason = device.type == "cuda", "asked for" if cfg.dtype != "auto" else "the fastest here"
    bf16 = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu._is_amx_tile_supported()
    auto = "bfloat16" if bf16 else "float32"
    dtype = getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    out, last = Path(cfg.out), Path(cfg.out) / "last.pt"
    out.mkdir(parents=True, exist_ok=True)

    model, meta, optimizer_state = open_run(cfg, config)
    config, explicit = model.config, cfg.stage == "explicit"
    tok = corpus.tokenizer(cfg.data)
    same = meta.get("tokenizer") in (None, tok.id) and tok.n_vocab <= config.vocab_size
    if not same or tuple(tok.header) != config.header:
        raise UserError(f"the checkpoint's tokenizer is not that of {cfg.data} ({tok.id})")
    meta |= dict(stage=cfg.stage, config=asdict(config), tokenizer=tok.id, train=asdict(cfg))
    optimizer = make_optimizer(model.to(device), cfg)
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    train = Windows(cfg, cfg.split, config)
    splits = {s: Windows(cfg, s, config) for s in cfg.val.split(",")}
    step_loss = torch.compile(loss_on) if cfg.compile else loss_on  # the weights keep their names

    tokens = cfg.batch * cfg.context  # of a step
    flops = cfg.batch * cost.step_flops(config, explicit, cfg.context)
    card = torch.cuda.get_device_name(device) if cuda else ""
    peak = next((v for k, v in PEAK.items() if k in card), None)
    n, keys = cfg.context + explicit * len(config.header), config.n_recall * config.memory_tokens
    group = config.n_head // config.n_kv_head
    path, why = attention_path(device, dtype, n, config.head_dim, group, explicit * keys)
    print(f"weights: {cost.weights(config):,}, non-embedding {config.n_params:,} (norms aside)")
    print(f"memory: {config.memory_shape}, {cost.memory_bytes(config, 'bf16'):,} bytes in bfloat16")
    print(
        f"step: {tokens:,} tokens = {cfg.batch} windows of {cfg.context}, {flops:.3g} FLOPs, "
        f"{explicit * tokens // config.chunk_len:,} references"
    )
    print(f"data: {len(train.tokens):,} tokens, {cfg.steps * cfg.batch / train.n:.2f} epochs")
    print(
        f"device: {card or device}, {dtype} ({reason}){', compiled' * cfg.compile}; "
        f"attention: {path} ({why})"
    )

    log = open(out / "log.jsonl", "a", buffering=1)  # each line at once
    losses, started = [], time.time()
    val = validate(model, splits, cfg, device, cast)  # first: what must fail fails early
    step = start = meta["step"]
    while step < cfg.steps:
        t0 = time.time()
        lr = cfg.lr * lr_at(step, cfg) * meta["lr_scale"]
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss_sum = 0.0
        for _ in range(cfg.batch // cfg.micro_batch):
            windows = [train.window(meta["position"] + i) for i in range(cfg.micro_batch)]
            meta["position"] += cfg.micro_batch
            batch = train.batch(windows, full_width=cfg.compile)
            with cast:
                loss = step_loss(model, batch, device) * (cfg.micro_batch / cfg.batch)
            loss.backward()
            loss_sum += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip))
        finite = math.isfinite(loss_sum + norm)  # one of both may be nan alone
        spike = len(losses) >= 100 and loss_sum > 1.5 * np.median(losses[-100:]) + 0.5
        back = cfg.back_off and last.exists() and meta["lr_scale"] > 1e-3
        if back and (spike or not finite):
            model_, then, optimizer_state = load_checkpoint(last, with_optimizer=True)
            model.load_state_dict(model_.state_dict())
            optimizer.load_state_dict(optimizer_state)
            optimizer.zero_grad(set_to_none=True)  # or nan would stay in every later gradient
            scale = meta["lr_scale"] * cfg.back_off
            # the position stays: go on with other data, for this batch may be the cause
            meta |= dict(step=then["step"], best=then["best"], lr_scale=scale)
            print(f"step {step}: loss {loss_sum:.3f} diverged; now {meta['step']}, lr x {scale}")
            step, losses = meta["step"], []
            continue
        line = f"step {step}: the loss is {loss_sum}, its gradient's norm {norm}"
        check(finite, f"{line}. Resume with a smaller --lr, or --back_off 0.5")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meta["step"] = step = step + 1
        losses.append(loss_sum)
        rate = tokens / (time.time() - t0)
        row = dict(step=step, loss=loss_sum, lr=lr, norm=norm, tokens_per_s=rate)
        row |= dict(mfu=flops * rate / tokens / peak) if peak else {}
        end = step == cfg.steps
        if step % 10 == 0 or end or cfg.steps <= 20:
            left = (time.time() - started) / (step - start) * (cfg.steps - step) / 60
            mfu = f"  MFU {row['mfu']:.3f}" if peak else ""
            print(
                f"step {step}/{cfg.steps}  loss {loss_sum:.4f}  lr {lr:.2e}  norm {norm:.2f}  "
                f"{rate:,.0f} tokens/s{mfu}  {left:.1f} min left",
                flush=True,
            )
        if step % cfg.eval_every == 0 or end:
            row["val"] = val = validate(model, splits, cfg, device, cast)
            first = next(iter(val.values()))  # of the first validation split
            if meta["best"] is None or first < meta["best"]:
                meta["best"] = first
                save_checkpoint(out / "best.pt", model, optimizer, meta)
        log.write(json.dumps(row) + "\n")
        if step % cfg.save_every == 0 or end:
            save_checkpoint(last, model, optimizer, meta)
        if cfg.keep_every and step % cfg.keep_every == 0:
            save_checkpoint(out / f"step_{step}.pt", model, None, meta)
    save_checkpoint(out / "model.pt", model, None, meta)  # what write.py, sample.py, eval.py open
    return dict(model=model, losses=losses, val=val, step=step)


# -- Command line: default < preset or checkpoint < flag --------------------------------------


def add_flags(parser, cls, skip=()):
    """A flag for every field of a dataclass, with its comment as the help text."""
    comments = dict(re.findall(r"^    (\w+): .*?#(.*)$", inspect.getsource(cls), re.M))
    for f in (f for f in fields(cls) if f.name not in skip):
        text = comments.get(f.name, "").strip().replace("%", "%%") + f" (default {f.default})"
        kind = dict(action="store_true") if f.type is bool else dict(type=type(f.default))
        parser.add_argument(f"--{f.name}", default=None, help=text, **kind)  # None: not given


def given(args, cls):
    return {f.name: x for f in fields(cls) if (x := getattr(args, f.name, None)) is not None}


# flags of the shape that no weight depends on: a new stage may change them
OF_MEMORIES = ("n_memory_layer", "memory_tokens", "n_recall", "chunk_len", "ref_len")
OF_MEMORIES += ("max_context", "approximate_weights", "memory_from", "selection")


def command_line(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--preset", help=f"shape of a new model: {', '.join(PRESETS)}")
    p.add_argument("--resume", metavar="OUT", help="go on with the run in this directory")
    add_flags(p.add_argument_group("run"), TrainConfig)
    add_flags(p.add_argument_group("model shape"), Config, skip=("header", "vocab_size"))
    args = p.parse_args(argv)
    shape = ["preset"] * bool(args.preset) + list(given(args, Config))
    fixed = shape if args.resume else [f for f in shape if args.init and f not in OF_MEMORIES]
    check(not fixed, f"--{', --'.join(fixed)}: a checkpoint has its shape already; leave that out")
    if args.resume:
        meta = load_checkpoint(Path(args.resume) / "last.pt")[1]
        return TrainConfig(**meta["train"] | given(args, TrainConfig) | dict(out=args.resume)), None
    cfg = TrainConfig(**given(args, TrainConfig))
    if cfg.init:
        return cfg, Config.from_dict(load_checkpoint(cfg.init)[1]["config"] | given(args, Config))
    check(args.preset, f"--preset is missing: {', '.join(PRESETS)}; or --init a checkpoint")
    tok = corpus.tokenizer(cfg.data)
    shape = dict(given(args, Config), vocab_size=tok.n_vocab, header=tuple(tok.header))
    return cfg, Config.preset(args.preset, **shape)


if __name__ == "__main__":
    run(lambda: main(*command_line()))
