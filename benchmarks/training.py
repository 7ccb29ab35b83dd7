"""A training step as train.py makes it, on random tokens, as many windows at a time as fit."""

import gc
from contextlib import suppress

import numpy as np
import torch

from model import Memory3
from train import loss_on, make_optimizer, recall_table


def training_step(b, c, cfg):
    """-> step(micro, explicit), of cfg.batch windows of max_context tokens, `micro` at a time; and
    largest(explicit), the most windows at a time that fit: 16, 8, 4, 2, 1, or None."""
    with torch.device(b.device):
        model = Memory3(c)
    optimizer, T, N = make_optimizer(model, cfg), c.max_context, -(-c.max_context // c.chunk_len)
    loss_of = torch.compile(loss_on) if b.compile else loss_on
    bf16 = b.dtype == torch.bfloat16

    def step(micro, explicit):
        tokens, references, recall = torch.randint(c.vocab_size, (micro, T)), None, None
        if explicit:
            references = torch.randint(c.vocab_size, (micro * N, c.ref_len))
            recall = recall_table(np.arange(micro * N).reshape(micro, N), c.n_recall)
        for _ in range(cfg.batch // micro):
            with torch.autocast(b.device.type, torch.bfloat16, enabled=bf16):
                loss = loss_of(model, (tokens, tokens, references, recall), b.device)
            (loss * micro / cfg.batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def fits(micro, explicit):
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()  # half made, where it was this that did not fit
        gc.collect()
        if b.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with suppress(torch.OutOfMemoryError):
            step(micro, explicit)
            return True

    def largest(explicit):
        return next((m for m in (16, 8, 4, 2, 1) if m <= cfg.batch and fits(m, explicit)), None)

    return step, largest
