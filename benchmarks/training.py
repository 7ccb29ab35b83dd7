"""A training step as train.py makes it, on random tokens, as many windows at a time as fit."""

import gc

import numpy as np
import torch

from model import Memory3
from train import loss_on, make_optimizer, recall_table


class TrainingStep:
    """Steps of cfg.batch windows of max_context tokens, `micro` of them at a time.

    b: the bench (see machine.py); config: the shape; cfg: a TrainConfig.
    """

    def __init__(self, b, config, cfg):
        self.b = b
        self.config = config
        self.cfg = cfg
        with torch.device(b.device):
            self.model = Memory3(config).to(getattr(torch, cfg.param_dtype))
        self.model.recompute = cfg.recompute
        self.optimizer = make_optimizer(self.model, cfg)
        self.model.fuse(b.compile)
        self.loss_on = loss_on

    def batch(self, micro, explicit):
        """-> tokens (micro, T), targets, references (micro*n_chunks, ref_len) and the table."""
        config = self.config
        tokens = torch.randint(config.vocab_size, (micro, config.max_context))
        if not explicit:
            return tokens, tokens, None, None
        n_chunks = -(-config.max_context // config.chunk_len)
        references = torch.randint(config.vocab_size, (micro * n_chunks, config.ref_len))
        ids = np.arange(micro * n_chunks).reshape(micro, n_chunks)  # each chunk has its own
        return tokens, tokens, references, recall_table(ids, config.n_recall)

    def __call__(self, micro, explicit):
        b = self.b
        batch = self.batch(micro, explicit)
        for _ in range(self.cfg.batch // micro):
            with torch.autocast(b.device.type, torch.bfloat16, enabled=b.dtype == torch.bfloat16):
                loss = self.loss_on(self.model, batch, b.device)
            (loss * micro / self.cfg.batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def fits(self, micro, explicit):
        """Whether steps with so many windows at a time fit into the device's memory: the second
        has the optimizer's state beside its activations."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()  # half made, where it was this that did not fit
        empty(self.b.device)
        try:
            self(micro, explicit)
            self(micro, explicit)
            return True
        except torch.OutOfMemoryError:
            pass
        except RuntimeError as error:  # what cuBLAS says of it
            if "ALLOC_FAILED" not in str(error):
                raise
        self.optimizer.zero_grad(set_to_none=True)
        empty(self.b.device)
        return False

    def largest(self, explicit):
        """The most windows at a time that fit: 16, 8, 4, 2, 1, or None."""
        for micro in (16, 8, 4, 2, 1):
            if micro <= self.cfg.batch and self.fits(micro, explicit):
                return micro
        return None


def empty(device):
    """Gives back what nobody uses, and counts peaks anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
