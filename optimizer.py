"""AdamW for weights in bfloat16, whose states and arithmetic are float32 (sec. 5.1).

PyTorch's AdamW keeps its states in the weights' dtype. In bfloat16 that loses the second moment,
and most steps as well: a number of bfloat16 has 8 significant bits, so a weight changes only if the
step is more than 1/512 of it, and a step of 1e-4 beside a weight of 0.05 is lost every time. A copy
of the weights in float32 would mend that for 4 more bytes a weight. Here instead the new weight is
rounded at random, up with the probability of its distance from below: small steps are made now and
then, and right on average (stochastic rounding; the paper does not say what it did).

Bytes a weight: 2 of weight, 2 of gradient, 8 of states = 12; in float32 16.
"""

import torch

from parallel import local


def first_states(optimizer):
    """Gives AdamW its states as they are before the first step: for a checkpoint to be read into
    them, and so that what does not fit a GPU fails early. The moments are float32, split as their
    weights are."""
    fused = optimizer.defaults.get("fused")
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            # fused, the kernel counts; else Python, which would have to wait for a GPU
            state["step"] = torch.zeros((), device=p.device if fused else "cpu")
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)


def round_at_random(x, generator):
    """x float32 -> bfloat16, up or down with the probability that makes the mean equal to x.

    A bfloat16 is the upper half of a float32. So: add a random number below 2**16 to the bits, and
    cut off the lower half; what lies half a step above a bfloat16 is rounded up half of the time.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(2**16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    cut = (bits + noise) & -(2**16)
    return cut.view(torch.float32).to(torch.bfloat16)


class RoundedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW (decoupled weight decay), with states in float32 whatever the weights are:
    those that first_states has given it. The random numbers depend on seed and step alone: a
    resumed run is the same run.
    """

    def __init__(self, groups, lr, betas, seed, eps=1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))
        self.seed = seed

    @torch.no_grad()
    def step(self, closure=None):
        generators = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                step = int(state["step"])
                if p.device not in generators:
                    generator = torch.Generator(p.device)
                    generators[p.device] = generator.manual_seed(self.seed * 1_000_003 + step)
                self._update(p, state, group, step, generators[p.device])

    @staticmethod
    def _update(p, state, group, step, generator):
        """One weight's step. Under FSDP each process updates the shard that it has."""
        weight = local(p)
        mean = local(state["exp_avg"])
        square = local(state["exp_avg_sq"])
        grad = local(p.grad).float()
        beta1, beta2 = group["betas"]
        mean.lerp_(grad, 1 - beta1)
        square.lerp_(grad.square(), 1 - beta2)
        scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        new = weight.float() * (1 - group["lr"] * group["weight_decay"])
        new.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**step))
        if weight.dtype == torch.bfloat16:
            new = round_at_random(new, generator)
        weight.copy_(new)
