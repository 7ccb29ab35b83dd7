"""Memory3 in lm-evaluation-harness, with memories or without (sec. 7.1). pip install lm_eval

    python experiments/lm_eval_adapter.py run --model memory3 \\
        --model_args bank=out/cities/kb.bank --device cpu --tasks NAME --include_path DIR_OF_TASKS

The command line is the harness's own. model_args: checkpoint, data, references, bank, n_recall, as
in eval.py (bank left out: no memories). Memories are recalled by the question alone where the
harness gives it apart from its examples (Instance.doc), else by the last chunk of the context.
None resembles it (overlap <= 2/3).
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, check, optional
from generate import generate, likelihood, model_flags, open_memory, open_model, pool_of
from memory import Memories
from retrieval import Filtered

try:
    LM = optional("lm_eval.api.model").LM
    register_model = optional("lm_eval.api.registry").register_model
except UserError as error:
    sys.exit(f"lm_eval_adapter.py: {error}")

QUESTION = ("question", "query", "sentence", "ctx", "text")  # where tasks keep what they ask
OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature")  # of generation: greedy only


def split_tokens(tokenizer, context, continuation):
    """-> (before, after): the tokens of the whole text, cut before the first that has something of
    the continuation. So it is the same wherever a text is cut, within a word or beside a space.
    Spaces at the context's end count as the continuation's, as in the harness's own models."""
    whole = tokenizer.encode(context + continuation)
    alone = tokenizer.encode(context.rstrip())
    n = 0
    while n < min(len(whole), len(alone)) and whole[n] == alone[n]:
        n += 1
    return whole[:n], whole[n:]


def question_of(doc, context):
    """The question of a harness document that stands in the context, or None."""
    if isinstance(doc, dict):
        for key in QUESTION:
            text = doc.get(key)
            if isinstance(text, str) and text.strip() and text.strip() in context:
                return text.strip()
    return None


def options_of(how):
    """-> (stops, number of tokens). UserError for an option that would be ignored."""
    unknown = sorted(set(how) - set(OPTIONS))
    check(not unknown, f"generation options {', '.join(unknown)}: not supported")
    sampled = how.get("do_sample") or how.get("temperature")
    check(not sampled, "generation options do_sample, temperature: greedy generation only")
    until = how.get("until") or []
    stops = [until] if isinstance(until, str) else until
    texts = isinstance(stops, list | tuple) and all(isinstance(x, str | None) for x in stops)
    check(texts, f"generation option until {until!r}: a text, or a list of texts")
    n = how.get("max_gen_toks")
    n = 64 if n is None else n
    check(type(n) is int and n >= 0, f"generation option max_gen_toks {n}: an integer from 0")
    return [stop for stop in stops if stop], n


@register_model("memory3")
class Memory3LM(LM):
    def __init__(self, bank="", batch_size=1, max_batch_size=None, **flags):
        super().__init__()
        parser = argparse.ArgumentParser("memory3", allow_abbrev=False)
        model_flags(parser)
        a = parser.parse_args([f"--{name}={value}" for name, value in flags.items()])
        self.model, self.tokenizer = open_model(
            a.checkpoint, a.data, a.device, n_recall=a.n_recall, verify=not a.no_verify
        )
        self.retriever = self.bank = None
        if bank:
            a.bank = bank
            references, retriever, self.bank = open_memory(a, self.model)
            self.retriever = Filtered(retriever, references)

    def read(self, query):
        """-> pool and table (1, R) of the memories that a query (tokens) recalls."""
        cfg = self.model.config
        if self.bank is None or not query:
            return Memories.empty(cfg, device=self.model.device), None
        ids = self.retriever.search([query], cfg.n_recall)[0]  # (1, R)
        return pool_of(self.bank, ids, self.model)

    def loglikelihood(self, requests):
        return [self.score(request) for request in requests]

    def score(self, request):
        """-> log p of the continuation, and whether it is what greedy generation gives."""
        context, continuation = request.args
        cfg = self.model.config
        before, after = split_tokens(self.tokenizer, context, continuation)
        question = question_of(getattr(request, "doc", None), context)
        query = self.tokenizer.encode(question) if question else before[-cfg.chunk_len :]
        pool, table = self.read(query)
        # A continuation beyond the context is scored in pieces, each after what fits before it.
        size = len(after) if len(after) <= cfg.max_context else cfg.max_context // 2
        total = 0.0
        greedy = True
        for i in range(0, len(after), max(1, size)):
            piece = after[i : i + size]
            room = cfg.max_context - len(piece)  # the last token is predicted, and not read
            head = [*before, *after[:i]]
            head = head[max(0, len(head) - room) :]
            pair = ([self.tokenizer.bos, *head], piece)
            logp, likeliest = likelihood(self.model, [pair], pool, table)[0]
            total += logp
            greedy = greedy and likeliest
        return total, greedy

    def loglikelihood_rolling(self, requests):
        """In windows of max_context; each chunk recalls by the text before it, as in generation."""
        size = self.model.config.max_context - 1
        bos = torch.tensor([[self.tokenizer.bos]])  # (1, 1)
        result = []
        for request in requests:
            (text,) = request.args
            tokens = self.tokenizer.encode(text)
            total = 0.0
            for i in range(0, len(tokens), size):
                window = torch.tensor([tokens[i : i + size]])  # (1, n)
                n = window.shape[1]
                trace = generate(self.model, bos, n, self.retriever, self.bank, forced=window)[1]
                total += float(trace.logprobs.sum())
            result.append(total)
        return result

    def generate_until(self, requests):
        """At most half of the context is generated; of a longer prompt its end is read."""
        options = [options_of(request.args[1]) for request in requests]  # before any work
        cfg = self.model.config
        result = []
        for request, (stops, n) in zip(requests, options, strict=True):
            n = min(n, cfg.max_context // 2)
            text = ""
            if n > 0:
                prompt = self.tokenizer.encode(request.args[0])
                room = cfg.max_context - n - 1
                prompt = [self.tokenizer.bos, *prompt[max(0, len(prompt) - room) :]]
                tokens = torch.tensor([prompt])  # (1, T)
                bos = self.tokenizer.bos  # begins another text: this one is at its end
                out, _ = generate(self.model, tokens, n, self.retriever, self.bank, stop=bos)
                said = [*out[0, len(prompt) :].tolist(), bos]
                text = self.tokenizer.decode(said[: said.index(bos)])
            for stop in stops:
                text = text.split(stop)[0]
            result.append(text)
        return result


if __name__ == "__main__":
    optional("lm_eval.__main__").cli_evaluate()  # what the command lm_eval calls
