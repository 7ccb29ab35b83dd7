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
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

import corpus
import retrieval
from memory import attention_path
from model import PRESETS, Config, Memory3, find_device, load_checkpoint

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
    back_off: float = 0.0  # > 0: on divergence, last checkpoint and lr times this (sec. 5.2)
    seed: int = 1  # of the weights and of the order of the windows
    device: str = "auto"  # cuda where there is one
    dtype: str = "auto"  # bfloat16 where the hardware has it, else float32
    compile: bool = False  # torch.compile: faster steps after a minute of waiting

    def __post_init__(self):
        if self.stage not in ("implicit", "explicit"):
            raise ValueError(f"--stage {self.stage}: implicit or explicit")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"--dtype {self.dtype}: auto, float32 or bfloat16")
        explicit = self.stage == "explicit"
        self.split = self.split or ("explicit" if explicit else "train")
        self.val = self.val or ("explicit_val,explicit_heldout" if explicit else "val,heldout")
        self.micro_batch = self.micro_batch or self.batch
        for name in ("context", "batch", "micro_batch", "steps", "eval_every", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: at least 1")
        if self.save_every < 1 or not 0 <= self.decay <= 1:
            raise ValueError("--save_every is at least 1, --decay a share between 0 and 1")
        if self.batch % self.micro_batch:
            raise ValueError(f"--batch {self.batch}: no multiple of micro_batch {self.micro_batch}")

# -- Batches ----------------------------------------------------------------------------------

class Windows:
    """The windows of a split, in a seeded order that depends on nothing but the position.

    tokens: the split; window i is [i*T, (i+1)*T). Its first token is overwritten by the BOS: the
    context begins with one in every format, and the grid of chunks stays that of the neighbours.
    neighbors (n_chunks, k) int32 and references: for the explicit stage, else None.
    """

    def __init__(self, cfg, split, config):
        self.T, self.C, self.bos = cfg.context, config.chunk_len, config.header[0]
        self.config, self.seed, self.shift = config, cfg.seed, cfg.query_shift
        self.tokens = corpus.open_tokens(cfg.data, split)
        self.n = len(self.tokens) // self.T
        if self.n == 0:
            raise ValueError(f"{cfg.data}/{split}.bin is shorter than one window of {self.T}")
        self.neighbors = None
        if cfg.stage == "explicit":
            if self.T % self.C:
                raise ValueError(f"--context {self.T} is no multiple of chunk_len {self.C}")
            self.neighbors, name = retrieval.open_neighbors(cfg.data, split, chunk_len=self.C)
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
        x = np.stack([self.tokens[w * T : (w + 1) * T] for w in windows]).astype(np.int64)
        tokens = torch.from_numpy(x)
        targets = torch.cat([tokens[:, 1:], torch.full((B, 1), -1)], 1)
        tokens[:, 0] = self.bos
        if self.neighbors is None:
            return tokens, targets, None, None
        c = T // self.C
        ids = np.stack([self.neighbors[w * c : (w + 1) * c, 0] for w in windows])  # (B, c)
        references = self.references.batch(
            np.maximum(ids, 0).ravel(), self.config.ref_len if full_width else None
        )
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
    for b in range(B):
        for i in range(c):
            seen = set()
            for r in range(R):
                j = i - shift - r
                if j >= 0 and ids[b, j] >= 0 and ids[b, j] not in seen:
                    seen.add(ids[b, j])
                    recall[b, i, r] = b * c + j
    return torch.from_numpy(recall)

def loss_on(model, batch, device):
    """The loss of one batch; writes its references first, where it has any."""
    tokens, targets, references, recall = (t if t is None else t.to(device) for t in batch)
    memories = None if references is None else model.write(references)
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
    groups = [
        dict(params=matrices, weight_decay=cfg.weight_decay),
        dict(params=vectors, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)

def save_checkpoint(path, model, optimizer, meta):
    """One file, written beside and renamed. Names carry no prefix of torch.compile."""
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), meta=meta)
    corpus.replace_file(path, lambda f: torch.save(state, f))
    corpus.write_json(Path(path).parent / "meta.json", meta)

# bf16 peak of cards, FLOP/s without sparsity; MFU is printed only for these
PEAK = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H800": 989e12, "H200": 989e12}

def flops_per_token(config, T, explicit):
    """Training FLOPs of one token: 3 passes, 2 per multiply-add (App. A.1). In the explicit stage
    each chunk also writes one reference (A.2, again 3 passes; the choice of tokens has no backward)
    and reads R memories. The 2.4B model's explicit step is 1.82 times its implicit one."""
    c, d = config, config.n_embd
    flops = c.n_params + c.n_layer * T * d + c.vocab_size * d
    if explicit:
        layer = c.n_params / c.n_layer
        per_ref = c.n_memory_layer * c.ref_len * (layer + (1 + 1 / 3) * c.ref_len * d)
        per_ref -= c.ref_len * 3 * d * c.mlp_width  # no MLP after the last keys and values
        flops += per_ref / c.chunk_len
        flops += c.n_memory_layer * 2 * c.n_recall * c.memory_tokens * d
    return 6 * flops

# -- The run ----------------------------------------------------------------------------------

def main(cfg, config=None):
    """Trains; returns dict(model, losses, val, step). config: the model's shape; None = that of
    cfg.init. Resumes where cfg.out holds a last.pt of the same run."""
    torch.manual_seed(cfg.seed)
    device = find_device(cfg.device)
    # bfloat16 where the hardware multiplies it (on a CPU: AMX); elsewhere float32 is faster
    cuda = device.type == "cuda"
    bf16 = torch.cuda.is_bf16_supported() if cuda else torch.cpu._is_amx_tile_supported()
    fast = "bfloat16" if bf16 else "float32"
    dtype, reason = (fast, "the fastest here") if cfg.dtype == "auto" else (cfg.dtype, "asked for")
    out, last = Path(cfg.out), Path(cfg.out) / "last.pt"
    out.mkdir(parents=True, exist_ok=True)

    optimizer_state = None
    # Nothing is random but the first weights and the order of windows, and both follow from the
    # seed: with the position, that is all a resumed run needs.
    meta = dict(step=0, position=0, best=None, lr_scale=1.0)
    if last.exists():
        model, meta, optimizer_state = load_checkpoint(last, with_optimizer=True)
        for name in ("stage", "data", "split", "init", "context", "batch", "query_shift", "seed"):
            was, now = meta["train"][name], getattr(cfg, name)
            if was != now:
                raise ValueError(
                    f"{last} is of a run with --{name} {was}, not {now}: choose another --out"
                )
        if config not in (None, model.config):
            raise ValueError(f"{last} is a model of another shape: choose another --out")
        print(f"resuming {last} at step {meta['step']}")
    elif cfg.init:
        model, init_meta = load_checkpoint(cfg.init)
        meta["tokenizer"] = init_meta.get("tokenizer")
        if config:  # the same weights, other memories: S, Lm, C ... can change between the stages
            weights, model = model.state_dict(), Memory3(config)
            model.load_state_dict(weights)
        print(f"starting from {cfg.init} ({init_meta['stage']} stage, step {init_meta['step']})")
    else:
        model = Memory3(config)
    config = model.config
    tok = corpus.tokenizer(corpus.manifest(cfg.data)["tokenizer"])
    same = meta.get("tokenizer") in (None, tok.id) and tok.n_vocab <= config.vocab_size
    if not same or tuple(tok.header) != config.header:
        raise ValueError(f"the checkpoint's tokenizer is not that of {cfg.data} ({tok.id})")
    model.to(device)
    optimizer = make_optimizer(model, cfg)
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    explicit = cfg.stage == "explicit"
    train = Windows(cfg, cfg.split, config)
    vals = {s: Windows(cfg, s, config) for s in cfg.val.split(",")}

    cast = nullcontext()
    if dtype != "float32":
        cast = torch.autocast(device.type, getattr(torch, dtype))
    step_loss = torch.compile(loss_on) if cfg.compile else loss_on
    longest = cfg.context + explicit * len(config.header)
    path, why = attention_path(device, getattr(torch, dtype), longest)
    flops = flops_per_token(config, cfg.context, explicit)
    card = torch.cuda.get_device_name() if cuda else ""
    peak = next((v for k, v in PEAK.items() if k in card), None)
    per_step = cfg.batch * cfg.context
    print(
        f"model: {sum(p.numel() for p in model.parameters()):,} weights, {config.n_params:,} of "
        f"them non-embedding\n"
        f"memory: {config.memory_shape}, {2 * math.prod(config.memory_shape):,} bytes in bfloat16\n"
        f"step: {per_step:,} tokens = {cfg.batch} windows of {cfg.context}, "
        f"{per_step // config.chunk_len if explicit else 0:,} references, "
        f"{flops * per_step:.3g} FLOPs\n"
        f"data: {len(train.tokens):,} tokens, {cfg.steps * cfg.batch / train.n:.2f} epochs\n"
        f"device: {card or device}, {dtype} ({reason}){', compiled' if cfg.compile else ''}; "
        f"attention: {path} ({why})"
    )

    def validate():
        """Loss on validation text; in the explicit stage also with nothing recalled."""
        model.eval()
        result = {}
        with torch.no_grad(), cast:
            for name, windows in vals.items():
                n = min(windows.n, cfg.eval_batches * cfg.micro_batch)
                sums = np.zeros(2)
                for i in range(0, n, cfg.micro_batch):
                    batch = windows.batch(range(i, min(n, i + cfg.micro_batch)))
                    size = len(batch[0])
                    sums[0] += loss_on(model, batch, device).item() * size
                    if explicit:
                        nothing = (*batch[:3], torch.full_like(batch[3], -1))
                        sums[1] += loss_on(model, nothing, device).item() * size
                result[name] = float(sums[0] / n)
                if explicit:
                    result[f"{name}, nothing recalled"] = float(sums[1] / n)
        model.train()
        return result

    losses, val, started = [], {}, time.time()
    start, log = meta["step"], open(out / "log.jsonl", "a")
    print("validation:", *(f"{k} {v:.4f}" for k, v in validate().items()), sep="  ")
    step = start
    while step < cfg.steps:
        t0 = time.time()
        lr = cfg.lr * lr_at(step, cfg) * meta["lr_scale"]
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss_sum = 0.0
        for _ in range(cfg.batch // cfg.micro_batch):
            windows = [train.window(meta["position"] + i) for i in range(cfg.micro_batch)]
            meta["position"] += cfg.micro_batch
            with cast:
                loss = step_loss(model, train.batch(windows, cfg.compile), device)
            loss = loss * (cfg.micro_batch / cfg.batch)
            loss.backward()
            loss_sum += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip))
        recent = losses[-100:]
        diverged = not math.isfinite(loss_sum) or not math.isfinite(norm)
        diverged |= len(recent) == 100 and loss_sum > 1.5 * float(np.median(recent)) + 0.5
        if diverged and cfg.back_off and last.exists() and meta["lr_scale"] > 1e-3:
            model_, meta_, optimizer_state = load_checkpoint(last, with_optimizer=True)
            model.load_state_dict(model_.state_dict())
            optimizer.load_state_dict(optimizer_state)
            scale = meta["lr_scale"] * cfg.back_off
            position = meta["position"]  # go on with other data: this batch may be the cause
            meta = meta_ | dict(lr_scale=scale, position=position)
            print(f"step {step}: loss {loss_sum:.3f} diverged; now {meta['step']}, lr x {scale}")
            step, losses = meta["step"], []
            optimizer.zero_grad(set_to_none=True)  # or nan would stay in every later gradient
            continue
        if not math.isfinite(loss_sum) or not math.isfinite(norm):
            raise FloatingPointError(
                f"step {step}: the loss is {loss_sum}, its gradient's norm {norm}. Resume with a "
                "smaller --lr, or --back_off 0.5"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        losses.append(loss_sum)
        dt = time.time() - t0
        row = dict(step=step, loss=loss_sum, lr=lr, norm=norm, tokens_per_s=per_step / dt)
        if peak:
            row["mfu"] = flops * per_step / dt / peak
        if step % cfg.eval_every == 0 or step == cfg.steps:
            val = validate()
            row["val"] = val
            print("validation:", *(f"{k} {v:.4f}" for k, v in val.items()), sep="  ")
        log.write(json.dumps(row) + "\n")
        log.flush()
        eta = (time.time() - started) / (step - start) * (cfg.steps - step)
        if step % 10 == 0 or step == cfg.steps or cfg.steps <= 20:
            print(
                f"step {step}/{cfg.steps}  loss {loss_sum:.4f}  lr {lr:.2e}  norm {norm:.2f}  "
                f"{per_step / dt:,.0f} tokens/s"
                + (f"  MFU {row['mfu']:.3f}" if peak else "")
                + f"  {eta / 60:.1f} min left",
                flush=True,
            )
        meta |= dict(
            step=step,
            stage=cfg.stage,
            config=asdict(config),
            tokenizer=tok.id,
            train=asdict(cfg),
        )
        first = next(iter(row.get("val", {}).values()), None)  # of the first validation split
        if first is not None and (meta["best"] is None or first < meta["best"]):
            meta["best"] = first
            save_checkpoint(out / "best.pt", model, optimizer, meta)
        if step % cfg.save_every == 0 or step == cfg.steps:
            save_checkpoint(last, model, optimizer, meta)
    # without the optimizer: what write.py, sample.py and eval.py open as --checkpoint OUT
    state = dict(model=model.state_dict(), meta=meta)
    corpus.replace_file(out / "model.pt", lambda f: torch.save(state, f))
    return dict(model=model, losses=losses, val=val, step=step)

# -- Command line: default < preset or checkpoint < flag --------------------------------------

def add_flags(parser, cls, skip=()):
    """A flag for every field of a dataclass, with its comment as the help text."""
    import inspect
    import re

    source = inspect.getsource(cls)
    for f in fields(cls):
        if f.name in skip:
            continue
        found = re.search(rf"^    {f.name}: .*?#(.*)$", source, re.M)
        text = (found.group(1).strip() if found else "").replace("%", "%%")
        default = f.default if f.default is not MISSING else None
        if f.type is bool or f.type == "bool":
            parser.add_argument(f"--{f.name}", action="store_true", default=None, help=text)
        else:
            kind = type(default) if default is not None else str
            parser.add_argument(f"--{f.name}", type=kind, help=f"{text} (default {default})")

def given(args, cls):
    names = {f.name for f in fields(cls)}
    return {k: v for k, v in vars(args).items() if k in names and v is not None}

# flags of the shape that no weight depends on: a new stage may change them
OF_MEMORIES = ("n_memory_layer", "memory_tokens", "n_recall", "chunk_len", "ref_len")
OF_MEMORIES += ("max_context", "approximate_weights")

def command_line(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--preset", help=f"shape of a new model: {', '.join(PRESETS)}")
    p.add_argument("--resume", metavar="OUT", help="go on with the run in this directory")
    add_flags(p.add_argument_group("run"), TrainConfig)
    add_flags(p.add_argument_group("model shape"), Config, skip=("header", "vocab_size"))
    args = p.parse_args(argv)
    shape = ["preset"] * bool(args.preset) + list(given(args, Config))
    fixed = shape if args.resume else [f for f in shape if f not in OF_MEMORIES]
    if fixed and (args.resume or args.init):
        raise ValueError(f"--{fixed[0]}: a checkpoint has its shape already; leave this flag out")
    if args.resume:
        meta = load_checkpoint(Path(args.resume) / "last.pt")[1]
        cfg = TrainConfig(**{**meta["train"], **given(args, TrainConfig), "out": args.resume})
        return cfg, None
    cfg = TrainConfig(**given(args, TrainConfig))
    if cfg.init:
        meta = load_checkpoint(cfg.init)[1]
        return cfg, Config.from_dict({**meta["config"], **given(args, Config)})
    if not args.preset:
        raise ValueError(f"--preset is missing: {', '.join(PRESETS)}; or --init a checkpoint")
    tok = corpus.tokenizer(corpus.manifest(cfg.data)["tokenizer"])
    shape = dict(given(args, Config), vocab_size=tok.n_vocab, header=tuple(tok.header))
    return cfg, Config.preset(args.preset, **shape)

if __name__ == "__main__":
    try:
        main(*command_line())
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as e:
        sys.exit(f"train.py: {e}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; go on with --resume")
