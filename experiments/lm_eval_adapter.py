"""Memory3 in lm-evaluation-harness, with memories or without (sec. 7.1). pip install lm_eval

    python experiments/lm_eval_adapter.py run --model memory3 \\
        --model_args bank=out/kb.bank --device cpu --tasks NAME --include_path DIR_OF_TASKS

The command line is the harness's own. model_args: flags of eval.py, such as checkpoint, data and
bank (left out: no memories). The harness gives no question apart from its examples, so memories are
recalled by the last chunk of the context, as in generation; none resembles it (overlap <= 2/3).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    raise ImportError("the adapter needs lm-evaluation-harness: pip install lm_eval") from None

from eval import open_memory, open_reader, parser  # noqa: E402
from generate import generate, likelihood, pool_of  # noqa: E402
from memory import Memories  # noqa: E402
from retrieval import Filtered  # noqa: E402


@register_model("memory3")
class Memory3LM(LM):
    def __init__(self, bank="", batch_size=1, max_batch_size=None, **flags):  # of eval.py
        super().__init__()
        a = parser().parse_args([f"--{k}={v}" for k, v in {**flags, "bank": bank}.items()])
        self.model, self.tok = open_reader(a)
        self.retriever = self.bank = None
        if bank:
            references, retriever, self.bank = open_memory(a, self.model)
            self.retriever = Filtered(retriever, references)

    def loglikelihood(self, requests):
        c, result = self.model.config, []
        for context, text in (request.args for request in requests):
            after = self.tok.encode(text)
            before = self.tok.encode(context)[-(c.max_context - len(after)) :]
            read = Memories.empty(c, device=self.model.device), None
            if self.bank and before:
                ids = self.retriever.search([before[-c.chunk_len :]], c.n_recall)[0]
                read = pool_of(self.bank, ids, self.model)
            result += likelihood(self.model, [([self.tok.bos, *before], after)], *read)
        return result

    def loglikelihood_rolling(self, requests):
        """In windows of max_context; each chunk recalls by the text before it, as in generation."""
        result, n = [], self.model.config.max_context - 1
        for (text,) in (request.args for request in requests):
            tokens, bos, logp = self.tok.encode(text), torch.tensor([[self.tok.bos]]), 0.0
            for i in range(0, len(tokens), n):
                part, both = torch.tensor([tokens[i : i + n]]), (self.retriever, self.bank)
                trace = generate(self.model, bos, part.shape[1], *both, forced=part)[1]
                logp += float(trace.logprobs.sum())
            result.append(logp)
        return result

    def generate_until(self, requests):
        c, result = self.model.config, []
        for context, how in (request.args for request in requests):
            n, stops = min(how.get("max_gen_toks", 64), c.max_context // 2), how["until"]
            prompt = [self.tok.bos, *self.tok.encode(context)[-(c.max_context - n - 1) :]]
            out, _ = generate(self.model, torch.tensor([prompt]), n, self.retriever, self.bank)
            text = self.tok.decode(out[0, len(prompt) :])
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0]
            result.append(text)
        return result


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # what the command lm_eval calls

    cli_evaluate()
