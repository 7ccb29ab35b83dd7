"""Training, both stages in one loop (sec. 3.6, 5).

    python train.py --preset toy --data data/cities --stage implicit --out out/implicit
    python train.py --init out/implicit --data data/cities --stage explicit --out out/toy
    python train.py --resume out/toy                      goes on where a stopped run left off
    torchrun --nproc_per_node 8 train.py --parallel fsdp ...        on 8 GPUs (parallel.py)

The stages differ in the batch and in nothing else. Implicit: windows of text, an ordinary decoder.
Explicit: the same, and each chunk of 64 tokens comes with the reference that retrieval found for
it. The model writes these references into memories on the fly, and chunk i reads those of chunks
i-4..i. The loss is over the text alone; its gradient reaches the writer through the kept keys and
values.

A run leaves in --out:
    model.pt, meta.json    the weights at the end: what write.py, sample.py and eval.py open
    last.pt                weights and optimizer of the last save: what --resume goes on from;
                           under fsdp they are beside it, in last_1000, a file a process
    best.pt                the weights where the loss on the first validation split was lowest
    step_1000.pt ...       weights on the way, with --keep_every
    log.jsonl              a row a step: loss, lr, norm, tokens/s, MFU, and validation now and then
"""

import argparse
import inspect
import json
import math
import os
import re
import shutil
import signal
import threading
import time
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import torch

import corpus
import cost
import parallel
import retrieval
from common import (
    UserError,
    check,
    check_fields,
    command,
    find_device,
    lock,
    replace_file,
    run,
)
from memory import attention_path
from model import PRESETS, Config, Memory3, load_checkpoint, read_checkpoint, save_checkpoint
from optimizer import RoundedAdamW, first_states


@dataclass
class TrainConfig:
    """The settings of a run. Every field is a flag: --steps 1000. So is the model's shape.

    An annotation gives the lowest and the highest value of a number, or all values of a text.
    """

    data: str = "data/cities"  # a prepared data set: its directory
    stage: Annotated[str, "implicit", "explicit"] = "implicit"  # without, with memories (3.6)
    split: str = ""  # training text; empty: train, or the stage's own
    val: str = ""  # validation splits; empty: val,heldout, or the stage's own
    out: str = "out/run"  # directory of the checkpoints and of log.jsonl
    init: str = ""  # a checkpoint to start from: its weights, not its optimizer
    context: Annotated[int, 1, 2**24] = 256  # T, tokens of a window
    batch: Annotated[int, 1, 2**20] = 16  # windows a step, on whatever hardware
    micro_batch: Annotated[int, 0, 2**20] = 0  # windows at a time; 0: what fits a GPU; on a CPU all
    steps: Annotated[int, 1, 10**9] = 1000  # of the optimizer, in all
    minutes: Annotated[float, 0, 10**6] = 0.0  # > 0: train so long, not --steps steps
    lr: Annotated[float, 0, 10] = 2e-3  # the highest; linear warmup, constant, linear decay
    warmup: Annotated[int, 0, 10**9] = 100  # steps
    decay: Annotated[float, 0, 1] = 0.1  # share of the steps, or minutes, that decay (sec. 5.1)
    weight_decay: Annotated[float, 0, 10] = 0.1  # on matrices (sec. 5.1)
    beta2: Annotated[float, 0, 0.999999] = 0.95  # AdamW's; beta1 is 0.9
    grad_clip: Annotated[float, 0, 10**9] = 1.0  # largest norm of the gradient; 0: no limit
    query_shift: Annotated[int, 0, 1] = 0  # 1: read what the chunk before retrieved
    eval_every: Annotated[int, 1, 10**9] = 250  # steps between validations (best.pt)
    eval_batches: Annotated[int, 1, 10**6] = 4  # batches of each validation split
    save_every: Annotated[int, 1, 10**9] = 250  # steps between checkpoints (last.pt)
    keep_every: Annotated[int, 0, 10**9] = 0  # steps between kept copies, step_N.pt; 0: none
    back_off: Annotated[float, 0, 0.99] = 0.0  # diverged: last.pt, lr times this; 0: nan ends it
    seed: Annotated[int, 0, 2**31 - 1] = 1  # of the first weights and the order of the windows
    device: str = "auto"  # cuda where there is one
    dtype: Annotated[str, "auto", "float32", "bfloat16"] = "auto"  # of matrix products
    param_dtype: Annotated[str, "float32", "bfloat16"] = "float32"  # of weights (paper: bfloat16)
    recompute: bool = False  # activations, in the backward: less RAM, a third more time
    parallel: Annotated[str, "none", "ddp", "fsdp"] = "none"  # over several processes (parallel.py)
    compile: bool = False  # torch.compile: faster steps after a minute of waiting
    no_verify: bool = False  # skip checksums of checkpoints: 3 to 6 s sooner for a 2.4b

    def __post_init__(self):
        check_fields(self, flag="--")
        explicit = self.stage == "explicit"
        # data/cities has text of its own for the explicit stage, data/text has not
        separate = explicit and not Path(self.data, "train.neighbors.bin").exists()
        if not self.split:
            self.split = "explicit" if separate else "train"
        if not self.val:
            self.val = "explicit_val,explicit_heldout" if separate else "val,heldout"
        if self.micro_batch:
            complete = self.batch % self.micro_batch == 0
            check(
                complete, f"--batch {self.batch}: no multiple of --micro_batch {self.micro_batch}"
            )


# -- Batches ----------------------------------------------------------------------------------


class Windows:
    """The windows of a split, in a seeded order that depends on nothing but the position.

    tokens: the split; window i is [i*T, (i+1)*T). The BOS overwrites its first token: so every
    context begins with one, and the chunks stay those for which neighbours were retrieved.
    neighbors (n_chunks, k) int32 and references: for the explicit stage, else None.
    """

    def __init__(self, cfg, split, config):
        self.config = config
        self.T = cfg.context
        self.C = config.chunk_len
        self.seed = cfg.seed
        self.shift = cfg.query_shift
        self.tokens = corpus.open_tokens(cfg.data, split)
        self.n = len(self.tokens) // self.T
        check(self.n, f"{cfg.data}/{split}.bin is shorter than one window of {self.T}")
        self.epoch = None  # the epoch that self.order is of
        self.neighbors = None
        if cfg.stage == "explicit":
            check(self.T % self.C == 0, f"--context {self.T} is no multiple of chunk_len {self.C}")
            found = retrieval.open_neighbors(cfg.data, split, chunk_len=self.C, context=self.T)
            self.neighbors, name = found
            self.references = corpus.References.open(f"{cfg.data}/{name}")

    def window(self, position):
        """The window at a position of the endless stream, in which each epoch is shuffled anew."""
        epoch, i = divmod(position, self.n)
        if self.epoch != epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        return int(self.order[i])

    def batch(self, windows, full_width=False):
        """-> tokens (B, T), targets (B, T), references (B*c, n), recall (B, c, R).

        The last two are None in the implicit stage. full_width: pad references to ref_len, for
        torch.compile wants one shape.
        """
        rows = [self.tokens[w * self.T : (w + 1) * self.T] for w in windows]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T)
        targets = tokens.roll(-1, 1)  # (B, T)
        targets[:, -1] = -1  # the next token is in another window
        tokens[:, 0] = self.config.header[0]  # the BOS
        if self.neighbors is None:
            return tokens, targets, None, None
        n_chunks = self.T // self.C
        found = [self.neighbors[w * n_chunks : (w + 1) * n_chunks, 0] for w in windows]
        ids = np.stack(found)  # (B, c), the best neighbour of each chunk, -1 = none
        written = np.maximum(ids, 0).ravel()  # for -1 reference 0 is written, and nobody reads it
        width = self.config.ref_len if full_width else None
        # row b*c + i is that of chunk i of window b
        references = self.references.batch(written, width)  # (B*c, n)
        recall = recall_table(ids, self.config.n_recall, self.shift)  # (B, c, R)
        return tokens, targets, references, recall


def recall_table(ids, n_recall, shift=0):
    """Which memories each chunk reads in training: chunk i those of i-R+1..i (sec. 3.6).

    ids (B, c): the reference that each chunk retrieved, -1 = none. The memory of ids[b, i] is row
    b*c + i of the pool. If several of the R chunks retrieved the same reference, it is read once.
    shift 1: read those of chunks i-R..i-1, as generated chunks do. Returns (B, c, R) int64.

    >>> recall_table(np.array([[7, 8, 8, -1]]), 2).tolist()
    [[[0, -1], [1, 0], [2, -1], [-1, 2]]]
    """
    batch, n_chunks = ids.shape
    recall = np.full((batch, n_chunks, n_recall), -1)
    for b, chunk in np.ndindex(batch, n_chunks):
        seen = {-1}  # -1 names no reference: never read
        for r in range(n_recall):
            source = chunk - shift - r  # the chunk that retrieved
            if source >= 0 and ids[b, source] not in seen:
                seen.add(ids[b, source])
                recall[b, chunk, r] = b * n_chunks + source
    return torch.from_numpy(recall)


def loss_on(model, batch, device):
    """The loss of one batch; its references, if any, are written into memories first.

    batch: as of Windows.batch. Returns the mean of nats a token, a number with a gradient.
    """
    batch = [x if x is None else x.to(device) for x in batch]
    tokens, targets, references, recall = batch
    memories = None
    if references is not None:
        memories = model.write(references)  # kv (B*c, Lm, 2, Hkv, S, dh)
    _, loss = model(tokens, targets, memories, recall, return_logits=False)
    return loss


# -- Schedule and optimizer -------------------------------------------------------------------


def lr_at(step, cfg, seconds=0.0):
    """Warmup-stable-decay (sec. 5.1), as a share of cfg.lr. seconds: trained so far (--minutes).

          ____________
         /            \\         up in `warmup` steps, then constant, and down in the last `decay`
        /              \\        of all steps (paper: 10 %, "rapidly"; linear is our choice)

    >>> cfg = TrainConfig(steps=100, warmup=10, decay=0.1)
    >>> [lr_at(s, cfg) for s in (0, 9, 50, 95, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.1]
    >>> lr_at(500, TrainConfig(minutes=10, decay=0.5), seconds=450)
    0.5
    """
    warmup = (step + 1) / max(1, cfg.warmup)
    if cfg.minutes:
        left = (60 * cfg.minutes - seconds) / max(1.0, cfg.decay * 60 * cfg.minutes)
    else:
        left = (cfg.steps - step) / max(1.0, cfg.decay * cfg.steps)
    return min(1.0, warmup, left)


def make_optimizer(model, cfg):
    """AdamW; weight decay on matrices only, not on norms.

    Weights in bfloat16 need an optimizer of their own: PyTorch's would keep its states in bfloat16.
    fused: one kernel steps all weights.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        dict(params=matrices, weight_decay=cfg.weight_decay),
        dict(params=vectors, weight_decay=0.0),
    ]
    betas = (0.9, cfg.beta2)
    if cfg.param_dtype == "bfloat16":
        return RoundedAdamW(groups, cfg.lr, betas, cfg.seed)
    return torch.optim.AdamW(groups, cfg.lr, betas, fused=True)


def clip_gradients(model, cfg):
    """Scales the gradients down to a norm of grad_clip; returns the norm before that."""
    most = cfg.grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    # under fsdp it is known in parts
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


# -- Setting up -------------------------------------------------------------------------------

# bfloat16, FLOP/s without sparsity, from the makers' data sheets
PEAK = dict(A100=312e12, A800=312e12, H100=989e12, H800=989e12, H200=989e12)


def choose_dtype(cfg, device):
    """-> the dtype of the computation, and why: the fastest that the hardware has."""
    if cfg.param_dtype == "bfloat16":
        return torch.bfloat16, "that of the weights"
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype), "asked for"
    # where it is emulated, bfloat16 is slower than float32
    if device.type == "cuda":
        found = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        found = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        found = False
    return torch.bfloat16 if found else torch.float32, "the fastest here"


def open_run(cfg, config, rank=0):
    """-> what the run begins with: the model's shape, meta, and the checkpoint to fill it from.

    That is its own last.pt, else cfg.init, of which the weights alone are taken, else new weights.
    Only the first process has tensors in it; those of last.pt stay in the file until they are
    copied. meta is what a checkpoint says of its run: step,
    position in the stream of windows, seconds, best loss ...
    """
    # Only the first weights and the order of the windows are random: seed and position give both.
    meta = dict(step=0, position=0, seconds=0.0, best=None, lr_scale=1.0)
    last = Path(cfg.out) / "last.pt"
    verify = not cfg.no_verify and rank == 0

    # the run goes on
    if last.exists():
        state, _ = read_checkpoint(last, verify)
        saved = state["meta"]
        is_run = "optimizer" in state and "train" in saved
        check(is_run, f"{last} holds weights alone, no run: --init {last} with another --out")
        for name in ("stage", "split", "init", "context", "batch", "query_shift", "seed"):
            before = saved["train"][name]
            current = getattr(cfg, name)
            line = f"{last} is of a run with --{name} {before}, not {current}: choose another --out"
            check(before == current, line)
        shape = Config.from_dict(saved["config"])
        valid = config in (None, shape)
        check(valid, f"{last} is a model of another shape: choose another --out")
        print(f"resuming {last} at step {saved['step']}")
        return shape, meta | saved, state

    # a new run, with new weights
    if not cfg.init:
        check_room(config)
        weights = Memory3(config).state_dict() if rank == 0 else None
        return config, meta, dict(model=weights)

    # a new run, with the weights of another one: the explicit stage after the implicit one. The
    # same weights, perhaps other memories: S, Lm, C ... can change between the stages
    before = read_checkpoint(cfg.init, verify=False)[0]["meta"]
    config = config or Config.from_dict(before["config"])
    weights = load_checkpoint(cfg.init, verify)[0].state_dict() if rank == 0 else None
    print(f"starting from {cfg.init} ({before.get('stage')} stage, step {before.get('step')})")
    return config, meta | dict(tokenizer=before.get("tokenizer")), dict(model=weights)


def open_all(cfg, config, rank):
    """-> the model's shape, meta, the checkpoint to fill it from, training windows, {split: windows
    to validate on}: the model and its text, checked against each other."""
    config, meta, state = open_run(cfg, config, rank)
    tokenizer = check_tokenizer(cfg, config, meta)
    train = Windows(cfg, cfg.split, config)
    text = check_data(cfg, train, meta)
    meta |= dict(stage=cfg.stage, config=asdict(config), train=asdict(cfg))
    meta |= dict(tokenizer=tokenizer, text=text)
    splits = {name: Windows(cfg, name, config) for name in cfg.val.split(",")}
    return config, meta, state, train, splits


def check_room(config):
    """UserError if the weights of a new model alone do not fit this machine's RAM. However many
    processes there are, the first alone makes them."""
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = 4 * cost.weights(config)
    line = f"{size / 1e9:,.0f} GB of weights, {room / 1e9:,.0f} GB of memory: give a smaller shape"
    check(size < room, line)


def check_tokenizer(cfg, config, meta):
    """UserError unless the model takes the data's tokenizer; returns the tokenizer's id.

    A token id must stand for the same bytes, and the header must be the one that --init has learnt.
    """
    tokenizer = corpus.tokenizer(cfg.data)
    equal = meta.get("tokenizer") in (None, tokenizer.id)
    valid = tokenizer.n_vocab <= config.vocab_size and tuple(tokenizer.header) == config.header
    line = f"the checkpoint's tokenizer is not that of {cfg.data} ({tokenizer.id})"
    check(equal and valid, line)
    return tokenizer.id


def check_data(cfg, windows, meta):
    """UserError unless a resumed run goes on with its own text; returns what identifies that."""
    first = np.ascontiguousarray(windows.tokens[:1_000_000])
    identity = f"{len(windows.tokens)} tokens, crc32 of the first {zlib.crc32(first):08x}"
    before = meta.get("text", identity)
    line = f"{cfg.data}/{cfg.split}.bin is not the text of this run: {identity}, not {before}"
    check(before == identity, line)
    return identity


def can_compile(device):
    """Whether torch.compile works here; if not, prints why."""

    def double(x):
        return 2 * x

    try:  # something small first: if that fails, it is the machine's fault
        torch.compile(double)(torch.ones(3, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        print(f"--compile: runs on without, as nothing can be compiled here ({reason})")
        return False
    return True


def fit_micro_batch(cfg, windows, model, step_loss, cast, device, size):
    """How many windows a process takes at a time: cfg.micro_batch, or on a GPU the most that fit.

    Tries all windows of a step first, and halves their number until they fit. The optimizer must
    have its states already.
    """
    share = cfg.batch // size
    if cfg.micro_batch or device.type != "cuda":
        return cfg.micro_batch or share
    if cfg.parallel == "fsdp":
        return measure_micro_batch(share, windows, model, step_loss, cast, device)
    micro = share
    while not fits(micro, share, windows, model, step_loss, cast, device):
        line = f"one window of {cfg.context} tokens does not fit: see benchmarks/fits.py"
        check(micro > 1, line)
        micro = micro // 2
        while share % micro != 0:  # it must divide this process's share of the batch
            micro -= 1
    return micro


def fits(micro, share, windows, model, step_loss, cast, device):
    """Whether the loss and gradient of so many windows fit the GPUs of all processes.

    It tries without ddp around the model, which would wait for the rest of a pass that failed.
    """
    step_loss = getattr(step_loss, "module", step_loss)
    failed = 0.0
    try:
        try_windows(micro, share, windows, step_loss, cast, device)
    except torch.OutOfMemoryError:
        failed = 1.0
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return parallel.reduce([failed], "max", device) == [0.0]


def try_windows(micro, share, windows, step_loss, cast, device):
    """Computes the gradient of so many windows; where a step takes more, twice, for the second time
    the gradients of the first are there."""
    batch = windows.batch([windows.window(i) for i in range(micro)], full_width=True)
    for _ in range(1 if micro == share else 2):
        with cast:
            loss = step_loss(batch, device)
        loss.backward()


def measure_micro_batch(share, windows, model, step_loss, cast, device):
    """fit_micro_batch under fsdp: the most windows of a process's share that will fit its GPU.

    It must not try too many: after half a pass fsdp's hooks would not know where they are, and the
    other processes would wait. So it goes up from one window, and measures: n times as many take at
    most n times the bytes, beside those that are always there. (Often fewer: on a GPU that is all
    but full it may end below the most.)
    """
    micro = 1
    while True:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        # what others do not have; a twentieth is for what the allocator loses between blocks
        room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before
        try_windows(micro, share, windows, step_loss, cast, device)
        used = torch.cuda.max_memory_allocated(device) - before
        model.zero_grad(set_to_none=True)
        used, room = parallel.reduce([used, -0.95 * room], "max", device)  # the fullest GPU's
        most = int(micro * -room / used)
        larger = [n for n in range(micro + 1, share + 1) if n <= most and share % n == 0]
        if not larger:
            torch.cuda.empty_cache()
            return micro
        micro = larger[-1]


def peak_flops(device):
    """FLOP/s of this card in bfloat16, or None if they are not known."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for name, flops in PEAK.items():
        if name in card:
            return flops
    return None


def describe(cfg, config, windows, device, dtype, reason, size):
    """Prints, before the first step, all that was derived from the flags."""
    explicit = cfg.stage == "explicit"
    tokens = cfg.batch * cfg.context
    flops = cfg.batch * cost.step_flops(config, explicit, cfg.context)
    references = tokens // config.chunk_len if explicit else 0
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    group = config.n_head // config.n_kv_head
    length = cfg.context  # tokens that attention sees
    keys = 0  # memory keys that a chunk reads
    if explicit:
        length += len(config.header)
        keys = config.n_recall * config.memory_tokens
    path, why = attention_path(device, dtype, length, config.head_dim, group, keys)
    epochs = "" if cfg.minutes else f", {cfg.steps * cfg.batch / windows.n:.2f} epochs"
    print(f"weights: {cost.weights(config):,}, non-embedding {config.n_params:,} (norms aside)")
    print(f"memory: {config.memory_shape}, {cost.memory_bytes(config, 'bf16'):,} bytes in bfloat16")
    print(f"step: {tokens:,} tokens = {cfg.batch} windows of {cfg.context}, {flops:.3g} FLOPs,")
    print(f"    {references:,} references, {cfg.micro_batch} windows at a time")
    print(f"data: {len(windows.tokens):,} tokens{epochs}")
    print(f"device: {card}, {dtype} ({reason}), weights in {cfg.param_dtype}")
    print(f"attention: {path} ({why})")
    if size > 1:
        minutes = parallel.TIMEOUT.seconds // 60
        hours = parallel.FILE_TIMEOUT.seconds // 3600
        line = f"one that waits {minutes} minutes for a step, {hours} hours for a file"
        print(f"processes: {size}, {cfg.parallel}; {line}, ends the run")


WAIT = 10  # seconds for another run in the same directory to end


@contextmanager
def only_run(out, rank):
    """No other run writes into `out` meanwhile: the first process holds the directory's lock."""
    with nullcontext() if rank > 0 else lock(out, WAIT):
        yield


def open_log(out, step, rank=0):
    """Opens log.jsonl to append a row a step; drops rows after `step`, left by a killed run."""
    if rank > 0:
        return open(os.devnull, "w")
    for name in ("*.pt", "meta.json", "log.jsonl"):
        for left in out.glob(f"{name}.tmp"):
            left.unlink()  # half written by a run that was killed
    path = out / "log.jsonl"
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if step_of(line) <= step:
                rows.append(line)
    text = "".join(row + "\n" for row in rows)
    replace_file(path, lambda file: file.write(text.encode()))
    return open(path, "a", buffering=1, encoding="utf-8")  # each line at once


def step_of(line):
    """The step of a row of log.jsonl; infinity for one that a kill has cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return math.inf


class Asked:
    """Whether Ctrl-C or a batch system's SIGTERM has come. The loop looks after each step, so no
    step is left half done.

    A step of several processes hangs if one of them fails, for which torchrun sends the rest a
    SIGTERM. Python's handlers do not run while the main thread waits for a GPU or a network, so a
    thread of its own notices: if no step ends in twice the time of the longest so far and PATIENCE
    more, the process ends at once. A second SIGTERM does not end it, for Slurm sends one to every
    process, and torchrun passes on its own.
    """

    PATIENCE = 10  # seconds

    def __init__(self):
        self.asked = False  # this process
        self.stopping = False  # all have agreed
        self.saving = False
        self.since = time.time()  # the last step's end
        self.longest = 0.0  # seconds from one step's end to the next, with what lies between

    def ask(self, number, frame):
        """The handler of both signals."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            print("\nstopping after this step, once it is saved; Ctrl-C again: at once", flush=True)
        self.asked = True

    def step_ended(self, stopping):
        """stopping: whether any process was asked."""
        now = time.time()
        self.longest = max(self.longest, now - self.since)
        self.since = now
        self.stopping = bool(stopping)

    @contextmanager
    def files(self):
        """Around what writes files, which may take long."""
        self.saving = True
        yield
        self.saving = False

    def watch(self, pipe):
        """The thread: waits for a signal, whose number Python writes into the pipe."""
        os.read(pipe, 1)  # or for its other end to be closed, when the run is over
        asked = time.time()
        limit = 2 * self.longest + self.PATIENCE
        while not self.stopping:
            time.sleep(0.1)
            if self.saving:
                asked = time.time()
            if time.time() > asked + limit:
                line = f"asked to stop, and no step has ended for {limit:.0f} s: not saved\n"
                os.write(2, line.encode())
                os._exit(1)


@contextmanager
def asked_to_stop(others=False):
    """Yields an Asked. A second Ctrl-C ends at once. others: whether steps wait for processes."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # no other thread gets signals
        return
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, asked.ask)
    if others:
        read, written = os.pipe()
        os.set_blocking(written, False)
        wakeup = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        thread = threading.Thread(target=asked.watch, args=(read,), daemon=True)
        thread.start()
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        asked.stopping = True  # nobody needs to watch any more
        if others:
            signal.set_wakeup_fd(wakeup)
            os.close(written)
            thread.join()
            os.close(read)


def validate(model, splits, cfg, cast, device, rank=0, size=1):
    """Mean loss over some windows of each split; in the explicit stage also with nothing recalled.

    splits: {name: Windows}. Returns {name: nats a token}, and prints it.
    """
    model.eval()
    result = {}
    for name, windows in splits.items():
        n = min(windows.n, cfg.eval_batches * cfg.batch)  # the same on whatever hardware
        cases = [name]
        if cfg.stage == "explicit":
            cases.append(f"{name}, nothing recalled")
        sums = [0.0] * len(cases)
        # All processes make the same number of passes, or fsdp would wait for ever. So a last pass
        # may have no windows: it computes one, which counts nothing.
        for first in range(0, n, cfg.micro_batch * size):
            start = first + rank * cfg.micro_batch
            rows = range(start, min(n, start + cfg.micro_batch))
            tokens, targets, references, recall = windows.batch(rows or [0])
            for i in range(len(cases)):
                if i == 1:
                    recall = torch.full_like(recall, -1)
                with torch.no_grad(), cast:
                    loss = loss_on(model, (tokens, targets, references, recall), device)
                sums[i] += loss.item() * len(rows) / n
        means = parallel.reduce(sums, "mean", device)
        for case, mean in zip(cases, means, strict=True):
            result[case] = mean * size
    model.train()
    shown = [f"{case} {loss:.4f}" for case, loss in result.items()]
    print("validation:", *shown, sep="  ")
    return result


# -- The run ----------------------------------------------------------------------------------


def add_gradients(step_loss, windows, position, cfg, cast, device, rank=0, size=1):
    """Adds up the gradients of a process's share of a step; returns the mean loss of that share."""
    n = cfg.batch // size  # windows of this process: those from position + rank * n on
    total = torch.zeros((), device=device)
    for first in range(0, n, cfg.micro_batch):
        start = position + rank * n + first
        chosen = [windows.window(start + i) for i in range(cfg.micro_batch)]
        batch = windows.batch(chosen, full_width=cfg.compile)
        last = first + cfg.micro_batch == n
        with parallel.adding_up(step_loss, last):
            with cast:
                loss = step_loss(batch, device) * (cfg.micro_batch / n)
            loss.backward()
        total += loss.detach()
    return total.item()


def save(path, model, meta, rank=0):
    """Writes a checkpoint of the weights alone, all in one file. All processes call it, and the
    first one writes."""
    weights = parallel.whole_weights(model)

    def write():
        if rank == 0:
            save_checkpoint(path, weights, meta)

    parallel.together(write)


def save_run(out, model, optimizer, meta, cfg, rank=0):
    """Writes last.pt, what a run goes on from. All processes call it.

    Under fsdp its tensors lie in a directory of their own for each save. A kill at any moment
    leaves a last.pt with all that belongs to it: before it is replaced the new directory is whole,
    and after that the old one goes.
    """
    if cfg.parallel == "fsdp":
        folder = out / f"last_{meta['step']}"
        parts = parallel.save_shards(folder, model, optimizer)
        content = dict(weights={}, optimizer={}, shards=parts)
    else:
        folder = None
        states = {name: optimizer.state[p] for name, p in model.named_parameters()}
        content = dict(weights=parallel.whole_weights(model), optimizer=states)

    def write():
        if rank > 0:
            return
        save_checkpoint(out / "last.pt", meta=meta, **content)
        for path in out.glob("last_*"):
            if re.fullmatch(r"last_\d+", path.name) and path != folder:
                shutil.rmtree(path)

    parallel.together(write)


def ended(meta, cfg):
    """Whether the run has made its steps, or used its minutes."""
    if cfg.minutes:
        return meta["seconds"] >= 60 * cfg.minutes
    return meta["step"] >= cfg.steps


def progress(row, meta, cfg, started, first):
    """The line to print for a step. started: when this process began, with step `first`."""
    step = row["step"]
    if cfg.minutes:
        minutes_left = cfg.minutes - meta["seconds"] / 60
        done = f"step {step}"
    else:
        seconds_a_step = (time.time() - started) / (step - first)
        minutes_left = seconds_a_step * (cfg.steps - step) / 60
        done = f"step {step}/{cfg.steps}"
    parts = [done]
    parts.append(f"loss {row['loss']:.4f}")
    parts.append(f"lr {row['lr']:.2e}")
    parts.append(f"norm {row['norm']:.2f}")
    speed = f"{row['tokens_per_s']:,.0f} tokens/s"
    parts.append(speed)
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.3f}")
    parts.append(f"{minutes_left:.1f} min left")
    return "  ".join(parts)


def main(cfg, config=None):
    """Trains; returns dict(model, losses, val, step). config: the model's shape; None = that of
    cfg.init. Resumes if cfg.out holds a last.pt of the same run."""
    # Where: processes, device, dtype, directory
    rank, size, device = parallel.start(cfg.parallel, find_device(cfg.device))
    shared = cfg.batch % (size * max(1, cfg.micro_batch)) == 0
    check(shared, f"--batch {cfg.batch}: {size} processes cannot share it out evenly")
    torch.manual_seed(cfg.seed)
    dtype, reason = choose_dtype(cfg, device)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    out = Path(cfg.out)
    last = out / "last.pt"

    # What: the model and its text, checked against each other
    opened = parallel.together(open_all, cfg, config, rank)
    config, meta, state, train, splits = opened
    # How: weights and their optimizer, on the devices and shared out among the processes
    with torch.device("meta"):
        model = Memory3(config).to(getattr(torch, cfg.param_dtype))
    model.recompute = cfg.recompute
    try:
        step_loss = parallel.share(cfg.parallel, model, loss_on, dtype, device)
        optimizer = make_optimizer(model, cfg)
        first_states(optimizer)
        parallel.load(model, optimizer, state, out, verify=not cfg.no_verify)
        del state, opened  # the first process had all of it
        if cfg.compile:
            model.fuse(can_compile(device))
        micro = fit_micro_batch(cfg, train, model, step_loss, cast, device, size)
    except torch.OutOfMemoryError:
        line = "weights, AdamW's states and one window do not fit this GPU"
        raise UserError(f"{line}: see benchmarks/fits.py, or --parallel fsdp") from None
    cfg = replace(cfg, micro_batch=micro)
    peak = peak_flops(device)
    flops = cost.step_flops(config, cfg.stage == "explicit", cfg.context) / cfg.context  # a token
    describe(cfg, config, train, device, dtype, reason, size)

    losses = []
    first = meta["step"]
    before = meta["seconds"]  # trained by earlier processes of this run
    saved = last.exists()
    with only_run(out, rank), asked_to_stop(size > 1) as asked:
        log = open_log(out, meta["step"], rank)
        val = validate(model, splits, cfg, cast, device, rank, size)  # what must fail fails early
        started = time.time()
        while not ended(meta, cfg):
            # the gradient of cfg.batch windows
            began = time.time()
            lr = cfg.lr * meta["lr_scale"] * lr_at(meta["step"], cfg, meta["seconds"])
            for group in optimizer.param_groups:
                group["lr"] = lr
            try:
                loss = add_gradients(
                    step_loss, train, meta["position"], cfg, cast, device, rank, size
                )
            except torch.OutOfMemoryError:
                line = f"{micro} windows at a time do not fit this GPU"
                raise UserError(f"{line}: a smaller --micro_batch, or --recompute") from None
            loss = parallel.reduce([loss], "mean", device)[0]
            norm = clip_gradients(model, cfg)
            meta["position"] += cfg.batch

            # divergence (sec. 5.2): nan or infinity in loss or norm, or a loss far above its median
            finite = math.isfinite(loss + norm)
            spike = len(losses) >= 100 and loss > 1.5 * np.median(losses[-100:]) + 0.5
            may_go_back = cfg.back_off and saved and meta["lr_scale"] > 1e-3
            if may_go_back and (spike or not finite):
                verify = not cfg.no_verify
                state = parallel.together(read_checkpoint, last, verify and rank == 0)[0]
                parallel.load(model, optimizer, state, out, verify)
                # the position stays, so that other data come: this batch may be the cause
                print(f"step {meta['step']}: loss {loss:.3f} diverged; back to the last checkpoint")
                meta["step"] = state["meta"]["step"]
                meta["best"] = state["meta"]["best"]
                meta["lr_scale"] *= cfg.back_off
                losses = []
                continue
            line = f"step {meta['step']}: the loss is {loss}, its gradient's norm {norm}"
            again = "Resume" if saved else "Begin again"
            other = "" if cfg.back_off else ", or --back_off 0.5"
            check(finite, f"{line}. {again} with a smaller --lr{other}")

            # the step
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            meta["step"] += 1
            step = meta["step"]
            losses.append(loss)
            clock = [float(asked.asked), before + time.time() - started]
            stopping, seconds = parallel.reduce(clock, "max", device)  # all processes agree
            asked.step_ended(stopping)
            if cfg.minutes:
                meta["seconds"] = seconds
            end = ended(meta, cfg)

            # what is printed, validated, logged and saved
            rate = cfg.batch * cfg.context / (time.time() - began)
            row = dict(step=step, loss=loss, lr=lr, norm=norm, tokens_per_s=rate)
            if peak:
                row["mfu"] = flops * rate / (peak * size)
            if step % 10 == 0 or end or cfg.steps <= 20:
                print(progress(row, meta, cfg, started, first), flush=True)
            is_best = False
            if step % cfg.eval_every == 0 or end:
                val = validate(model, splits, cfg, cast, device, rank, size)
                row["val"] = val
                mean = next(iter(val.values()))  # of the first validation split
                is_best = meta["best"] is None or mean < meta["best"]
                if is_best:
                    meta["best"] = mean
            log.write(json.dumps(row) + "\n")
            with asked.files():
                if is_best:
                    save(out / "best.pt", model, meta, rank)
                if step % cfg.save_every == 0 or end or stopping:
                    save_run(out, model, optimizer, meta, cfg, rank)
                    saved = True
                if cfg.keep_every and step % cfg.keep_every == 0:
                    save(out / f"step_{step}.pt", model, meta, rank)
            if stopping and not end:
                parallel.stop()
                again = command("train.py", "--resume", out)
                raise KeyboardInterrupt(f"after step {step}, which is saved; go on with {again}")
        save(out / "model.pt", model, meta, rank)  # what write.py, sample.py, eval.py open
        log.close()
    return dict(model=model, losses=losses, val=val, step=meta["step"])


def measure(cfg, config, steps=3):
    """Tokens a second in training a new model of this shape on this machine. Saves nothing.

    The first step allocates and is not counted. It helps to choose a shape for limited time.
    """
    device = find_device(cfg.device)
    dtype, _ = choose_dtype(cfg, device)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    model = Memory3(config).to(device, getattr(torch, cfg.param_dtype))
    model.recompute = cfg.recompute
    windows = Windows(cfg, cfg.split, config)
    optimizer = make_optimizer(model, cfg)
    first_states(optimizer)
    step_loss = parallel.share("none", model, loss_on, dtype, device)
    micro = fit_micro_batch(cfg, windows, model, step_loss, cast, device, 1)
    cfg = replace(cfg, micro_batch=micro)
    for step in range(steps + 1):
        if step == 1:
            began = time.time()
        add_gradients(step_loss, windows, step * cfg.batch, cfg, cast, device)
        clip_gradients(model, cfg)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return steps * cfg.batch * cfg.context / (time.time() - began)


# -- Command line: default < preset or checkpoint < flag --------------------------------------


def add_flags(parser, cls, defaults, skip=()):
    """A flag for every field of a dataclass, with its comment as the help text.

    defaults: {name: value} where the help shall show another default than the class's.
    """
    comments = dict(re.findall(r"^    (\w+): .*?#(.*)$", inspect.getsource(cls), re.M))
    for field in fields(cls):
        if field.name in skip:
            continue
        default = defaults.get(field.name, field.default)
        text = comments.get(field.name, "").strip().replace("%", "%%")
        text += f" (default {default})" if default != "" else ""
        kind, *allowed = get_args(field.type) or [field.type]
        options = dict(type=kind)
        if kind is bool:
            options = dict(action="store_true")
        elif kind is str and allowed:
            options = dict(choices=allowed)
        # None: not given, so that what a checkpoint or a preset says stays
        parser.add_argument(f"--{field.name}", default=None, help=text, **options)


def given(args, cls):
    """The fields of a dataclass that the command line gives, by name."""
    values = {field.name: getattr(args, field.name, None) for field in fields(cls)}
    return {name: value for name, value in values.items() if value is not None}


# flags of the shape on which no weight depends: a new stage may change them
OF_MEMORIES = ("n_memory_layer", "memory_tokens", "n_recall", "chunk_len", "ref_len")
OF_MEMORIES += ("max_context", "approximate_weights", "memory_from", "selection", "memory_heads")
# flags that say how a run is carried out, not what it is: --resume does not bring them back
OF_THIS_TIME = ("parallel", "no_verify")


def parse(argv):
    """The flags, each None where it is not given. --help shows the defaults of the preset."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    preset = first.parse_known_args(argv)[0].preset  # its values are the defaults of the help

    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--preset", choices=list(PRESETS), help="shape of a new model")
    p.add_argument("--resume", metavar="OUT", help="go on with the run in this directory")
    add_flags(p.add_argument_group("run"), TrainConfig, {})
    shape = p.add_argument_group("model shape")
    add_flags(shape, Config, PRESETS.get(preset, {}), skip=("header", "vocab_size"))
    return p.parse_args(argv)


def command_line(argv=None):
    """-> TrainConfig, and Config: that of a new model, of --init as changed, or None to resume.

    UserError for flags that do not go together, before anything is made.
    """
    args = parse(argv)
    # weights from a checkpoint have their shape already
    shape = given(args, Config)
    fixed = ["preset"] if args.preset else []
    fixed += [name for name in shape if args.resume or name not in OF_MEMORIES]
    if args.resume or args.init:
        flags = ", --".join(fixed)
        check(not fixed, f"--{flags}: a checkpoint has its shape already; leave that out")
    both = args.minutes and args.steps
    check(not both, "--minutes and --steps: give one, the run ends by it")

    # a resumed run keeps its settings, except for the flags that are given
    if args.resume:
        last = Path(args.resume) / "last.pt"
        check(last.exists(), f"--resume {args.resume}: no last.pt there, so no run to go on with")
        settings = read_checkpoint(last, verify=False)[0]["meta"].get("train")  # main verifies it
        check(settings, f"{last} holds weights alone, no run: --init {last} with another --out")
        listed = [field.name for field in fields(TrainConfig) if field.name not in OF_THIS_TIME]
        settings = {name: settings[name] for name in listed if name in settings}
        if args.steps:  # the run now ends by these, not by the minutes it was begun with
            settings["minutes"] = 0.0
        settings |= given(args, TrainConfig) | dict(out=args.resume)
        return TrainConfig(**settings), None

    # a new run, with the weights of another one
    cfg = TrainConfig(**given(args, TrainConfig))
    if cfg.init:
        saved = read_checkpoint(cfg.init, verify=False)[0]["meta"]["config"]
        return cfg, Config.from_dict(saved | shape)

    # a new run, with new weights: the vocabulary is that of the data set's tokenizer
    check(args.preset, f"--preset is missing: {', '.join(PRESETS)}; or --init a checkpoint")
    tokenizer = corpus.tokenizer(cfg.data)
    shape |= dict(vocab_size=tokenizer.n_vocab, header=tuple(tokenizer.header))
    return cfg, Config.preset(args.preset, **shape)


def cli():
    cfg, config = command_line()
    parallel.run(main, cfg, config)


if __name__ == "__main__":
    run(cli)
