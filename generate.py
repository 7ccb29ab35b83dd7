"""The engine: generation with recall every chunk, likelihoods, opening a model (sec. 3.1).

Prompt and generated tokens lie on one grid of chunks of C = 64. Each chunk of the prompt recalls
R = 5 memories by its own text; from then on, whenever the context has grown by a chunk, its last C
tokens are the query for R new memories, which replace the old ones.
"""

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch

import corpus
from common import check, find_device
from memory import Memories, attention_path
from model import Cache, load_checkpoint

# -- Generation -------------------------------------------------------------------------------


@dataclass
class Trace:
    """What happened. recalls: for each chunk that recalled, dict(chunk, query (B, <=C) tokens, ids
    (B, R), scores (B, R)); its memories stay until the next entry. logprobs (B, n_new) of the new
    tokens; greedy (B, n_new): whether each was the likeliest. seconds: by what they went to."""

    recalls: list = field(default_factory=list)
    logprobs: torch.Tensor = None
    greedy: torch.Tensor = None
    seconds: dict = field(default_factory=lambda: dict(search=0, load=0, prefill=0, steps=0))

    def table(self, n_chunks):
        """(B, n_chunks, R) reference ids as one table: what model.forward needs for the same."""
        B, R = self.recalls[0]["ids"].shape
        table = np.full((B, n_chunks, R), -1)
        for r in self.recalls:
            table[:, r["chunk"] :] = r["ids"][:, None]
        return table


def pool_of(bank, ids, model, codec=None):
    """Loads the memories that ids (any shape, -1 = none) name: a pool, and ids as its rows.
    codec: the bank's, for a pool that is still its codes."""
    names, rows = np.unique(ids, return_inverse=True)
    none = int(len(names) > 0 and names[0] < 0)  # -1 comes first
    names, table = names[none:], torch.from_numpy(rows.reshape(ids.shape) - none).to(model.device)
    if len(names) == 0:
        return Memories.empty(model.config, model.device), table
    return bank.recall(names, decode=False) if codec else bank.recall(names), table


def choose(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> one token a row. temperature 0: the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p > top_p, -math.inf)  # keeps the first
        logits = torch.full_like(logits, -math.inf).scatter(-1, index, ordered)
    # p / (a number of the exponential distribution) is largest at token t with probability p_t;
    # torch.multinomial does this as well, but makes Python wait for the GPU
    p = logits.softmax(-1)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


class Steps:
    """One step of generation, over and over: decode the last token, choose the next, keep it.
    All that a step reads and writes stays in its place. So CUDA captures it once as a graph and
    then replays that, sampling included: to start its thousand kernels from Python would take
    longer than they run. A recall between two steps overwrites the cache's slots in place, too.
    tokens, logprobs and greedy (B, n) are of the prompt and what follows; see Trace."""

    @torch.inference_mode(False)  # tensors that may be changed inside of that mode and outside
    def __init__(self, model, B, n, plain, forced, *sampling):
        device, weights = model.device, model.embed.weight
        self.cache = Cache(model.config, B, n, not plain, weights.dtype, device)
        self.forced, self.sampling, self.graph = forced, sampling, None
        self.generator = torch.Generator(device)
        self.tokens, self.logprobs, self.greedy = (
            torch.zeros(B, n, dtype=t, device=device) for t in (torch.int64, torch.float32, bool)
        )
        self.at = torch.zeros(1, dtype=int, device=device)  # the next token's place in them
        # how often to look whether all have stopped: to look waits for the GPU
        self.look = model.config.chunk_len if weights.is_cuda else 1

    def start(self, tokens, forced, seed):
        T = tokens.shape[1]
        self.tokens[:, :T] = tokens
        if self.forced:
            self.tokens[:, T : T + forced.shape[1]] = forced
        self.at.fill_(T)
        self.cache.clear()
        self.generator.manual_seed(seed)

    def keep(self, logits):
        """The next token of each sequence, chosen by logits (B, V) or forced."""
        new = self.tokens.index_select(1, self.at)
        if not self.forced:
            new = choose(logits, *self.sampling, self.generator)[:, None]
        self.tokens.index_copy_(1, self.at, new)
        logprobs = logits.float().log_softmax(-1).gather(-1, new)
        self.logprobs.index_copy_(1, self.at, logprobs)
        self.greedy.index_copy_(1, self.at, logits.argmax(-1, keepdim=True) == new)
        self.at += 1

    def step(self, model):
        last = self.tokens.index_select(1, self.at - 1)[:, 0]
        self.keep(model.decode(last, self.cache))

    def __call__(self, model):
        if self.at.is_cuda:
            self.graph = self.graph or self.capture(model)
            self.graph.replay()
        else:
            self.step(model)

    @torch.inference_mode(False)  # nor may the graph's own tensors be of that mode
    @torch.no_grad()
    def capture(self, model):
        """As PyTorch's notes on CUDA graphs want it: run on a side stream first, then record."""
        before, rng = (self.at.clone(), self.cache.length.clone()), self.generator.get_state()
        device = self.at.device  # which need not be the current one
        side, now = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(now)
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(model)
                self.at.copy_(before[0])  # what it wrote there will be written over
                self.cache.length.copy_(before[1])
        now.wait_stream(side)
        self.generator.set_state(rng)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, stream=side):
            self.step(model)  # recorded, not run
        return graph


def steps_for(model, B, n, *how):
    """Steps for B sequences of n tokens. On CUDA those of earlier calls where they fit: capturing
    takes longer than a short answer. model.steps has the last four, of rounded lengths."""
    weights, kept = model.embed.weight, vars(model).setdefault("steps", {})
    if not weights.is_cuda:
        return Steps(model, B, n, *how)
    n = min(model.config.max_context, 1 << (n - 1).bit_length())
    places = tuple(p.data_ptr() for p in model.parameters())  # where a graph reads weights
    key = B, n, how, model.config.n_recall, weights.dtype, places
    kept[key] = kept.pop(key, None) or Steps(model, B, n, *how)
    for old in list(kept)[:-4]:
        del kept[old]
    return kept[key]


def clock(device):
    if device.type == "cuda":  # which works on its own
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def generate(
    model,
    tokens,
    n_new,
    retriever=None,
    bank=None,
    *,
    plain=False,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    forced=None,
    stop=None,
):
    """Continues prompts by n_new tokens, recalling memories on the way.
    tokens (B, T) int64: prompts of one length, BOS first. retriever and bank: both, or neither (the
    header and an empty pool). plain: the format of the implicit stage, without header. forced
    (B, n_new): tokens to follow instead of the model's own choice; the trace then says how likely
    they were, and whether the model would have chosen them. stop: a token at which to end early,
    once every sequence has it. Returns tokens (B, T + n_new or fewer) and the Trace."""
    c, (B, T) = model.config, tokens.shape
    check(T > 0, "the prompt is empty; it has at least the BOS")
    line = f"{T} prompt tokens and {n_new} new ones; the context is at most {c.max_context}"
    check(T + n_new <= c.max_context, f"{line}: shorten the prompt, or ask for fewer tokens")
    check(n_new > 0, f"{n_new} new tokens were asked for; it takes at least 1")
    short = forced is not None and forced.shape != (B, n_new)
    check(not short, f"forced is to be ({B}, {n_new}) tokens: B, n_new")
    check((retriever is None) == (bank is None), "memories need both a retriever and a bank")
    check(bank is None or not plain, "the plain format has no header and reads no memories")
    C, R, trace, device = c.chunk_len, c.n_recall, Trace(), model.device
    steps = steps_for(model, B, T + n_new, plain, forced is not None, temperature, top_k, top_p)
    steps.start(tokens, forced, seed)
    codec, began = getattr(bank, "codec", None), clock(device)

    def recall(queries, chunks, codec=None):
        """queries: per chunk (B, <=C) tokens -> pool, table (B, len(chunks), R)."""
        start = clock(device)
        flat = [q for query in queries for q in query.tolist()]  # all chunks in one search
        ids, scores = retriever.search(flat, R)
        ids, scores = (np.asarray(x).reshape(len(chunks), B, R) for x in (ids, scores))
        for chunk, query, i, score in zip(chunks, queries, ids, scores, strict=True):
            trace.recalls.append(dict(chunk=chunk, query=query, ids=i, scores=score))
        found = time.perf_counter()
        pool, table = pool_of(bank, ids.transpose(1, 0, 2), model, codec)
        trace.seconds["search"] += found - start
        trace.seconds["load"] += clock(device) - found
        return pool, table

    # The prompt, in one pass. Full chunks are their own queries; a last chunk that is not full is
    # queried by the last C tokens of the prompt, not by its few own.
    pool, table = None if plain else Memories.empty(c, device=device), None
    if retriever is not None:
        queries = [tokens[:, i : i + C] for i in range(0, T - C + 1, C)]
        if T % C:
            queries.append(tokens[:, max(0, T - C) :])
        pool, table = recall(queries, range(len(queries)))
    logits = model(steps.tokens[:, :T], None, pool, table, steps.cache)[0][:, 0]
    if table is not None:
        steps.cache.load_memories(pool, table[:, -1])
    del pool  # a bank's memory, used again
    trace.seconds["prefill"] = clock(device) - began - sum(trace.seconds.values())

    steps.keep(logits)
    for n in range(T, T + n_new):  # token n comes; the ones before it are the context
        if n > T:
            steps(model)
        if stop is not None and n % steps.look == 0:
            if before_stop(steps.tokens[:, T : n + 1], stop) <= n - T:
                break
        # Token n - 1 still belonged to the old chunk: it read the old memories. Now new ones come.
        if retriever is not None and n % C == 0 and T < n < T + n_new - 1:
            pool, table = recall([steps.tokens[:, n - C : n].clone()], [n // C], codec)
            steps.cache.load_memories(pool, table[:, 0], codec)
            del pool
    trace.seconds["steps"] = clock(device) - began - sum(trace.seconds.values())
    end = n + 1
    if stop is not None:
        end = min(end, T + 1 + before_stop(steps.tokens[:, T:end], stop))
    trace.logprobs, trace.greedy = (x[:, T:end].clone() for x in (steps.logprobs, steps.greedy))
    return steps.tokens[:, :end].clone(), trace


def before_stop(said, stop):
    """How many columns of said (B, n) come before every sequence has had `stop`."""
    return int((said != stop).cumprod(1).any(0).sum())


# -- Likelihood -------------------------------------------------------------------------------


@torch.inference_mode()
def likelihood(model, pairs, memories=None, recall=None):
    """How likely texts are to go on so: for each pair (before, after) of token lists the log of the
    probability of `after`, and whether each of its tokens is the likeliest.

    memories: a pool, None = the plain format. recall (B, R): the rows of it that pair b reads, in
    all its chunks. Pairs of any lengths: one batch, padded on the right, where no token looks."""
    rows = [torch.tensor([*before, *after[:-1]], device=model.device) for before, after in pairs]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
    if recall is not None:
        n_chunks = -(-tokens.shape[1] // model.config.chunk_len)
        recall = recall[:, None].expand(-1, n_chunks, -1)  # (B, n_chunks, R)
    logits = model(tokens, None, memories, recall)[0].float().cpu()  # (B, T, V)
    result = []
    for (before, after), x in zip(pairs, logits, strict=True):
        x, after = x[len(before) - 1 :][: len(after)], torch.tensor(after)  # (n, V), (n,)
        logp = x.log_softmax(-1).gather(-1, after[:, None]).sum()
        result.append((float(logp), bool((x.argmax(-1) == after).all())))
    return result


# -- Writing a fact down ----------------------------------------------------------------------


def remember(text, tokenizer, config, retriever, bank):
    """Writes a text into the knowledge base, the bank and the index, now. Returns reference ids.
    A text beyond ref_len tokens becomes several references, as in sec. 4.4."""
    tokens, ids = tokenizer.encode(text), []
    check(tokens, "--remember: the text is empty")
    for i in range(0, len(tokens), config.ref_len):
        piece = tokens[i : i + config.ref_len]
        near = retriever.search([piece], min(8, len(retriever)))[0][0]  # other orders score alike
        known = [int(j) for j in near if j >= 0 and bank.references[int(j)].tolist() == piece]
        if known:
            ids.append(known[0])  # remembered before
            continue
        ids.append(bank.append(piece))
        retriever.add([ids[-1]], [tokenizer.decode(piece)])
        retriever.save(bank.references)
    return ids


# -- Opening a model ---------------------------------------------------------------------------


def open_model(checkpoint, data, device, dtype="auto"):
    """-> model and tokenizer, checked against each other; prints what runs and why.
    dtype: of the weights; auto: bfloat16 on a GPU that has it: decoding waits for their bytes."""
    (model, meta), device = load_checkpoint(checkpoint), find_device(device)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" or dtype == "auto" and fast:
        model.rounded(torch.bfloat16)
    model.to(device).eval()
    c, tokenizer = model.config, corpus.tokenizer(data)
    trained = f"{checkpoint} was trained with tokenizer {meta['tokenizer']}"
    check(meta["tokenizer"] == tokenizer.id, f"{trained}; that of {data} is {tokenizer.id}")
    dtype, chunk = model.embed.weight.dtype, len(c.header) + c.chunk_len
    sizes = c.head_dim, c.n_head // c.n_kv_head, c.n_recall * c.memory_tokens
    path, why = attention_path(device, dtype, chunk, *sizes)
    print(
        f"{checkpoint}: {c.n_params:,} non-embedding weights on {device}, {dtype}; attention of "
        f"a prompt of one chunk: {path} ({why})"
    )
    return model, tokenizer
