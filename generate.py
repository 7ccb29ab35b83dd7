"""The engine: generation with recall every chunk, likelihoods, opening a model (sec. 3.1).

Prompt and generated tokens lie on one grid of chunks of C = 64. Each chunk of the prompt recalls
R = 5 memories by its own text. From then on, whenever the length of the context is a multiple of C,
its last C tokens are the query for R new memories, which replace the old ones.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import corpus
from bank import MemoryBank, Texts
from common import check, command, find_device, number
from embed import HashEmbedder
from index import best_of
from memory import Memories, attention_path
from model import Cache, load_checkpoint
from retrieval import NOTHING, Live, Only

# -- Generation -------------------------------------------------------------------------------


def no_seconds():
    return dict(search=0.0, load=0.0, prefill=0.0, steps=0.0)


@dataclass
class Trace:
    """What happened during one call of generate.

    recalls    one dict(chunk, query, ids, scores) for each chunk that recalled: query (B, <=C)
               tokens, ids and scores (B, R). Its memories stay until the next entry.
    logprobs   (B, n_new) log-probabilities of the new tokens
    greedy     (B, n_new) whether each of them was the likeliest
    seconds    where the time went: search, load, prefill, steps
    """

    recalls: list = field(default_factory=list)
    logprobs: torch.Tensor = None
    greedy: torch.Tensor = None
    seconds: dict = field(default_factory=no_seconds)

    def table(self, n_chunks):
        """The reference ids that each chunk read, (B, n_chunks, R): see pool_of and forward."""
        check(self.recalls, "nothing was recalled: there was no retriever")
        batch, n_recall = self.recalls[0]["ids"].shape
        table = np.full((batch, n_chunks, n_recall), -1)
        for recalled in self.recalls:
            table[:, recalled["chunk"] :] = recalled["ids"][:, None]
        return table


def pool_of(bank, ids, model, codec=None):
    """Loads the memories of references `ids`: -> a pool, and `ids` as rows of that pool.

    ids: any shape, -1 = none. codec: that of the bank, if the pool's kv shall stay codes."""
    names, rows = np.unique(ids, return_inverse=True)  # ascending, each once
    table = torch.from_numpy(rows.reshape(ids.shape)).to(model.device)
    if len(names) > 0 and names[0] < 0:  # "none" comes first; the pool has no row for it
        names = names[1:]
        table = table - 1
    if len(names) == 0:
        return Memories.empty(model.config, model.device), table
    if codec:
        return bank.recall(names, decode=False), table
    return bank.recall(names), table


def sample_token(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> one token a sequence (B,). temperature 0: the likeliest token."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    # With the largest at 0, a tiny temperature sends the others to -inf and none to +inf.
    logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / max(temperature, 1e-30)  # float32 has nothing much smaller
    if top_k:
        k = min(top_k, logits.shape[-1])
        kth = logits.topk(k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # 0 at the first token, so that one always stays
        ordered = ordered.masked_fill(before > top_p, -math.inf)
        logits = torch.full_like(logits, -math.inf).scatter(-1, index, ordered)
    # If each p_t is divided by a random number of the exponential distribution, token t comes out
    # largest with probability p_t. (torch.multinomial makes Python wait for the GPU.)
    p = logits.softmax(-1)
    noise = torch.empty_like(p).exponential_(generator=generator)
    noise = noise.clamp(min=1e-30)  # 0 / 0 is nan, which argmax takes for the largest
    return (p / noise).argmax(-1)


class Steps:
    """Repeats one step of generation: decode the last token, choose the next, keep it.

    Whatever a step reads and writes stays in its place. So CUDA can capture the step as a graph,
    sampling included, and replay it: starting its thousand kernels from Python takes longer than
    running them. A recall between two steps overwrites the cache's slots in place, too.
    tokens, logprobs and greedy (B, n) cover the prompt and what follows; see Trace.
    """

    @torch.inference_mode(False)  # its tensors are changed both inside and outside that mode
    def __init__(self, model, batch, n, plain, forced, temperature, top_k, top_p):
        device = model.device
        weights = model.embed.weight
        self.cache = Cache(model.config, batch, n, not plain, weights.dtype, device)
        self.forced = forced  # whether the tokens are given beforehand
        self.sampling = (temperature, top_k, top_p)
        self.generator = torch.Generator(device)
        self.graph = None
        self.tokens = torch.zeros(batch, n, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(batch, n, dtype=torch.float32, device=device)
        self.greedy = torch.zeros(batch, n, dtype=torch.bool, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # the next token's place in them
        # look every so many tokens whether all have stopped: each look waits for the GPU
        self.look = model.config.chunk_len if weights.is_cuda else 1

    def start(self, tokens, forced, seed):
        """Begins with prompts tokens (B, T); forced (B, n_new): the tokens to follow, or None."""
        n_prompt = tokens.shape[1]
        self.tokens[:, :n_prompt] = tokens
        if self.forced:
            self.tokens[:, n_prompt : n_prompt + forced.shape[1]] = forced
        self.at.fill_(n_prompt)
        self.cache.clear()
        self.generator.manual_seed(seed)

    def keep(self, logits):
        """The next token of each sequence, chosen by logits (B, V) or forced."""
        likeliest = logits.argmax(-1, keepdim=True)  # (B, 1)
        temperature = self.sampling[0]
        if self.forced:
            new = self.tokens.index_select(1, self.at)  # (B, 1)
        elif temperature == 0:
            new = likeliest
        else:
            new = sample_token(logits, *self.sampling, self.generator)[:, None]  # (B, 1)
        self.tokens.index_copy_(1, self.at, new)
        logprobs = logits.float().log_softmax(-1).gather(-1, new)  # (B, 1)
        self.logprobs.index_copy_(1, self.at, logprobs)
        self.greedy.index_copy_(1, self.at, likeliest == new)
        self.at += 1

    def step(self, model):
        last = self.tokens.index_select(1, self.at - 1)[:, 0]  # (B,)
        self.keep(model.decode(last, self.cache))

    def __call__(self, model):
        if not self.at.is_cuda:
            self.step(model)
            return
        if self.graph is None:
            self.graph = self.capture(model)
        self.graph.replay()

    @torch.inference_mode(False)  # nor may the graph's own tensors be of that mode
    @torch.no_grad()
    def capture(self, model):
        """Follows PyTorch's notes on CUDA graphs: run on a side stream first, then record."""
        at = self.at.clone()
        length = self.cache.length.clone()
        rng = self.generator.get_state()
        device = self.at.device  # which need not be the current one
        side = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(model)
                self.at.copy_(at)  # what it wrote will be overwritten
                self.cache.length.copy_(length)
        current.wait_stream(side)
        self.generator.set_state(rng)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        # cuBLAS has a workspace. If the graph shared it with others, they could free it while the
        # graph needs it, as graphs of torch.compile do. Made during the capture, it is its own.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(graph, stream=side):
            self.step(model)  # recorded, not run
        torch._C._cuda_clearCublasWorkspaces()
        return graph


def steps_for(model, batch, n, plain, forced, temperature, top_k, top_p):
    """Steps for B sequences of n tokens. On CUDA those of an earlier call are used again if they
    fit, since capturing takes longer than a short answer. model.steps keeps the last four; their
    lengths are rounded up to powers of 2."""
    weights = model.embed.weight
    how = (plain, forced, temperature, top_k, top_p)
    if not weights.is_cuda:
        return Steps(model, batch, n, *how)
    n = min(model.config.max_context, 1 << (n - 1).bit_length())
    places = tuple(p.data_ptr() for p in model.parameters())  # where the graph reads the weights
    reading = (model.config.n_recall, model.config.memory_heads)
    key = (batch, n, how, reading, model.blocks[0].fuse, weights.dtype, places)
    kept = vars(model).setdefault("steps", {})
    steps = kept.pop(key, None)
    if steps is None:
        steps = Steps(model, batch, n, *how)
    kept[key] = steps  # the most recently used stands last
    for old in list(kept)[:-4]:
        del kept[old]
    return steps


def clock(device):
    if device.type == "cuda":  # the GPU may still be at work
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
    """Continues prompts by n_new tokens, recalling memories on the way (sec. 3.1).

    tokens (B, T) int64: prompts of one length, BOS first.
    retriever, bank: both, or neither (then the model has the header and an empty pool).
    plain: the format of the implicit stage, without header.
    forced (B, n_new): tokens to follow instead of the model's own choice; the trace then says how
        likely they were, and whether the model would have chosen them.
    stop: a token at which to end early, once every sequence has it.

    Returns tokens (B, T + n_new or fewer) and the Trace. UserError for arguments that do not fit.
    """
    cfg = model.config
    check(tokens.ndim == 2, f"prompts of shape {tuple(tokens.shape)}; give (B, T) tokens")
    batch, n_prompt = tokens.shape
    n_end = n_prompt + n_new
    check(tokens.numel() > 0, "the prompt is empty; it must have at least the BOS")
    low = int(tokens.min())
    high = int(tokens.max())
    line = f"token ids are 0 to {cfg.vocab_size - 1}; the prompt has {low} to {high}"
    check(low >= 0 and high < cfg.vocab_size, line)
    valid = math.isfinite(temperature) and temperature >= 0
    check(valid, f"temperature {temperature}: give a number from 0")
    check(top_k >= 0, f"top_k {top_k}: give a number from 0, which keeps all tokens")
    check(0 <= top_p <= 1, f"top_p {top_p}: give a number from 0 to 1")
    check(n_new > 0, f"{n_new} new tokens were asked for; ask for at least 1")
    check_fits(n_prompt, n_new, cfg)
    if forced is not None:
        valid = forced.shape == (batch, n_new)
        check(valid, f"forced must be ({batch}, {n_new}) tokens: B, n_new")
        valid = 0 <= int(forced.min()) and int(forced.max()) < cfg.vocab_size
        check(valid, f"forced must be token ids, 0 to {cfg.vocab_size - 1}")
    check((retriever is None) == (bank is None), "memories need both a retriever and a bank")
    check(bank is None or not plain, "the plain format has no header and reads no memories")
    chunk_len = cfg.chunk_len
    device = model.device
    trace = Trace()
    given = forced is not None
    steps = steps_for(model, batch, n_end, plain, given, temperature, top_k, top_p)
    steps.start(tokens, forced, seed)
    began = clock(device)

    def retrieve(queries, chunks, codec=None):
        """Finds and loads memories. queries[i] (B, <=C): the tokens by which chunks[i] recalls.

        Returns a pool and, as rows of it, the table (B, len(chunks), R) of what each recalls."""
        start = clock(device)
        texts = [text for query in queries for text in query.tolist()]  # all chunks in one search
        ids, scores = retriever.search(texts, cfg.n_recall)  # (len(chunks) * B, R)
        ids = np.asarray(ids).reshape(len(chunks), batch, -1)  # (len(chunks), B, R)
        scores = np.asarray(scores).reshape(ids.shape)
        for i, chunk in enumerate(chunks):
            recalled = dict(chunk=chunk, query=queries[i], ids=ids[i], scores=scores[i])
            trace.recalls.append(recalled)
        found = time.perf_counter()
        pool, table = pool_of(bank, ids.transpose(1, 0, 2), model, codec)
        loaded = clock(device)
        trace.seconds["search"] += found - start
        trace.seconds["load"] += loaded - found
        return pool, table

    # The prompt, in one pass. Full chunks are their own queries; a last chunk that is not full is
    # queried by the last C tokens of the prompt, not by its few own.
    pool = None if plain else Memories.empty(cfg, device=device)
    table = None
    if retriever is not None:
        n_full = n_prompt // chunk_len
        queries = [tokens[:, i * chunk_len : (i + 1) * chunk_len] for i in range(n_full)]
        if n_prompt % chunk_len:
            queries.append(tokens[:, max(0, n_prompt - chunk_len) :])
        pool, table = retrieve(queries, range(len(queries)))
    prompt = steps.tokens[:, :n_prompt]
    logits = model(prompt, None, pool, table, steps.cache)[0][:, 0]  # (B, V) after the last token
    if table is not None:
        steps.cache.load_memories(pool, table[:, -1])
    del pool  # the bank reuses its buffer
    trace.seconds["prefill"] = clock(device) - began - sum(trace.seconds.values())

    steps.keep(logits)
    codec = getattr(bank, "codec", None)
    for n in range(n_prompt, n_end):  # token n is chosen; those before it are the context
        if n > n_prompt:
            steps(model)
        if stop is not None and n % steps.look == 0:
            said = steps.tokens[:, n_prompt : n + 1]
            if before_stop(said, stop) < said.shape[1]:
                break
        # Token n is the first of a new chunk. Token n - 1 was the last to read the old memories;
        # now new ones come, unless it was the prompt's last (the prompt's memories stay) or no
        # token would read them.
        if retriever is not None and n % chunk_len == 0 and n_prompt < n < n_end - 1:
            query = steps.tokens[:, n - chunk_len : n].clone()  # (B, C)
            pool, table = retrieve([query], [n // chunk_len], codec)
            steps.cache.load_memories(pool, table[:, 0], codec)
            del pool
    trace.seconds["steps"] = clock(device) - began - sum(trace.seconds.values())

    end = n + 1
    if stop is not None:
        end = min(end, n_prompt + before_stop(steps.tokens[:, n_prompt:end], stop) + 1)
    trace.logprobs = steps.logprobs[:, n_prompt:end].clone()
    trace.greedy = steps.greedy[:, n_prompt:end].clone()
    return steps.tokens[:, :end].clone(), trace


def check_fits(n_prompt, n_new, cfg):
    """UserError, saying what would fit, if prompt and answer are longer than max_context."""
    most = cfg.max_context
    line = f"{n_prompt} prompt tokens and {n_new} new ones are more than max_context = {most}"
    check(n_prompt < most, f"{line}: shorten the prompt")
    check(n_prompt + n_new <= most, f"{line}: ask for at most {most - n_prompt} (--tokens)")


def before_stop(said, stop):
    """How many columns of said (B, n) come before the one in which the last sequence stops."""
    going_on = (said != stop).cumprod(1)  # 1 up to the stop of each sequence
    return int(going_on.any(0).sum())


def in_context(texts, prompt, room):
    """RAG: puts texts (token lists, best first) before the prompt, as many as fit `room` tokens."""
    context = []
    for text in texts:
        if len(context) + len(text) + len(prompt) > room:
            break
        context.extend(text)
    return context + prompt


# -- Likelihood -------------------------------------------------------------------------------


@torch.inference_mode()
def likelihood(model, pairs, memories=None, recall=None):
    """How likely the model finds given continuations.

    pairs: (before, after), token lists of any length; `before` must not be empty. They make one
    batch, padded on the right, where no token looks. memories: a pool; None = the plain format.
    recall (B, R): the rows of the pool that pair b reads, in all its chunks.

    Returns for each pair the log-probability of `after`, and whether each of its tokens is the
    likeliest; (0.0, True) for an empty one.
    """
    rows = [torch.tensor([*before, *after[:-1]], device=model.device) for before, after in pairs]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
    if recall is not None:
        n_chunks = -(-tokens.shape[1] // model.config.chunk_len)
        recall = recall[:, None].expand(-1, n_chunks, -1)  # (B, n_chunks, R)
    logits = model(tokens, None, memories, recall)[0].float().cpu()  # (B, T, V)
    result = []
    for i, (before, after) in enumerate(pairs):
        start = len(before) - 1
        x = logits[i, start : start + len(after)]  # (n, V)
        after = torch.tensor(after, dtype=torch.int64)  # (n,)
        logp = x.log_softmax(-1).gather(-1, after[:, None]).sum()
        greedy = (x.argmax(-1) == after).all()
        result.append((float(logp), bool(greedy)))
    return result


# -- Writing a fact down ----------------------------------------------------------------------


def has_word(text):
    """Whether a text has a letter or digit: without one no question finds it."""
    return any(letter.isalnum() for letter in text)


def remember(text, tokenizer, config, retriever, bank):
    """Writes a text and its memory into the knowledge base at once. Returns reference ids.

    A text of more than ref_len tokens becomes several references, as in sec. 4.4. A text that is
    there already, word for word, is not written again. UserError for a text without a letter or
    digit. The retriever takes in what has changed at its next search, and so finds the text."""
    check(has_word(text), f"--remember {text!r}: there is no word in it")
    pieces = corpus.fit(text, tokenizer, config.ref_len)
    sources = [dict(source="--remember")] * len(pieces)
    return bank.add(pieces, sources)


# -- Several knowledge bases ------------------------------------------------------------------


class Several:
    """Several knowledge bases as one (sec. 7.4): finds references in all of them and recalls them.

    Reference i of base b has the id b * STEP + i. To make scores comparable, the word frequencies
    that the embedders have learnt from each base are added up, and what was found is scored anew.
    """

    STEP = 10**9
    codec = None  # their memories come as numbers, even from codes on disk

    def __init__(self, sources, banks):
        self.sources = sources  # what finds references in each
        self.banks = banks
        self.references = self
        self.path = ", ".join(str(bank.path) for bank in banks)
        self.meta = sources[0].meta
        self.record_bytes = banks[0].record_bytes
        self.quantized = False
        self.embedder = self._common_embedder()

    def _common_embedder(self):
        """An embedder that knows the words of all bases; None if all have the same one."""
        embedders = [source.embedder for source in self.sources]
        if len({each.id for each in embedders}) == 1:
            return None
        names = {each.name for each in embedders}
        hashed = len(names) == 1 and isinstance(embedders[0], HashEmbedder)
        line = f"{self.path}: their embedders, {' and '.join(sorted(names))}, do not compare"
        check(hashed, f"{line}: make one index anew with python kb.py index --embedder")
        state = sum(each.state.astype(np.int64) for each in embedders)
        return HashEmbedder(embedders[0].dim, state.astype("<u4"))

    def __len__(self):
        return len(self.banks[0])

    def __getitem__(self, i):
        base, row = divmod(int(i), self.STEP)
        return self.banks[base].references[row]

    def live(self):
        """The ids of all bases that are not deleted (n,)."""
        ids = [base * self.STEP + bank.live() for base, bank in enumerate(self.banks)]
        return np.concatenate(ids)

    def origin(self, i):
        base, row = divmod(int(i), self.STEP)
        return f"{self.banks[base].path}, {self.banks[base].references.origin(row)}"

    def search(self, queries, k):
        """As Retriever.search, in all bases."""
        ids = []
        scores = []
        for base, source in enumerate(self.sources):
            found, similar = source.search(queries, k)
            if self.embedder:
                similar = self._scores(source, queries, found)
            ids.append(np.where(found >= 0, found + base * self.STEP, -1))
            scores.append(np.where(found >= 0, similar, NOTHING))
        ids = np.concatenate(ids, 1)  # (n, bases * k)
        return best_of(ids, np.concatenate(scores, 1), k)

    def _scores(self, source, queries, found):
        """(n, k): what one base found, scored by the common embedder."""
        scores = np.full(found.shape, NOTHING, np.float32)
        vectors = self.embedder.encode(source.texts_of(queries))  # (n, dim)
        for n, texts in enumerate(source.found_texts(found)):
            if texts:
                scores[n, found[n] >= 0] = self.embedder.encode(texts) @ vectors[n]
        return scores

    def recall(self, ids):
        """As MemoryBank.recall: a pool, row m the memory of ids[m]."""
        ids = np.asarray(ids)
        pools = []
        rows = []  # the places of each pool's memories in `ids`
        for base, bank in enumerate(self.banks):
            of_base = np.flatnonzero(ids // self.STEP == base)
            if len(of_base):
                pools.append(bank.recall(ids[of_base] % self.STEP))
                rows.append(of_base)
        order = np.argsort(np.concatenate(rows))
        return Memories.cat(pools)[torch.from_numpy(order).to(pools[0].kv.device)]

    def add(self, sequences, sources=None):
        """New texts go into the first base."""
        return self.banks[0].add(sequences, sources)

    def stats(self):
        return "; ".join(bank.stats() for bank in self.banks)


# -- Opening a model with its memory ----------------------------------------------------------

BANK = "out/{data}/{references}.bank"  # where a data set's knowledge base is kept


def model_flags(parser, bank=True):
    """Adds the flags with which a command opens a model and, with bank, its memory."""
    add = parser.add_argument
    add("--checkpoint", default="checkpoints/toy", help="a .pt file, or a directory of one")
    add("--data", default="data/cities", help="a prepared data set")
    add("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one")
    no_verify = "skip the checkpoint's checksum: 3 to 6 s sooner for a 2.4b"
    add("--no_verify", action="store_true", help=no_verify)
    n_recall = "R, memories a chunk; 0: as trained"
    add("--n_recall", type=number(int, 0, 1000), default=0, help=n_recall)
    if bank:
        add("--references", default="kb", help="its knowledge base")
        add("--bank", default=BANK, help="directory of the knowledge base and its memories")
        add("--kb", action="append", default=[], help="like --bank; repeat it to search several")
        add("--filter", action="append", default=[], help="only sources with this key=value")


def place(template, data, references):
    """The path that --bank names: the default follows --data and --references.

    >>> place(BANK, "data/cities", "kb")
    'out/cities/kb.bank'
    """
    name = Path(data).resolve().name
    return template.replace("{data}", name).replace("{references}", references)


def open_model(checkpoint, data, device, dtype="auto", n_recall=0, verify=True):
    """-> model and tokenizer, checked against each other; prints what runs and why.

    dtype: of the weights; auto: bfloat16 on a GPU that has it, for the time of decoding is that of
    reading the weights. n_recall: R, if not the checkpoint's. (A memory does not depend on R, so
    any R goes with the same bank.)"""
    model, meta = load_checkpoint(checkpoint, verify)
    device = find_device(device)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" or dtype == "auto" and fast:
        model.rounded(torch.bfloat16)
    model.to(device).eval()
    tokenizer = corpus.tokenizer(data)
    trained = f"{checkpoint} was trained with tokenizer {meta['tokenizer']}"
    check(meta["tokenizer"] == tokenizer.id, f"{trained}; that of {data} is {tokenizer.id}")
    if n_recall:
        model.config.n_recall = n_recall
    say_what_runs(checkpoint, model)
    return model, tokenizer


def say_what_runs(checkpoint, model):
    """Prints one line: the model's size, its device, which attention runs, and why."""
    cfg = model.config
    dtype = model.embed.weight.dtype
    tokens = len(cfg.header) + cfg.chunk_len
    group = cfg.n_head // cfg.n_kv_head
    slots = cfg.n_recall * cfg.memory_tokens
    path, why = attention_path(model.device, dtype, tokens, cfg.head_dim, group, slots)
    size = f"{cfg.n_params:,} non-embedding weights on {model.device}, {dtype}"
    print(f"{checkpoint}: {size}; attention of a prompt of one chunk: {path} ({why})")


def open_memory(a, model, cold_start=False):
    """Opens the knowledge base that the flags `a` of model_flags name: -> its references, their
    retriever, and the bank of their memories.

    cold_start: if there is no bank, make an empty one; memories are then encoded at their first
    retrieval (sec. 3.1)."""
    check(not a.kb or a.bank == BANK, "--bank and --kb: give one of them; --kb may be repeated")
    paths = a.kb or [place(a.bank, a.data, a.references)]
    resolved = {Path(path).resolve() for path in paths}
    check(len(resolved) == len(paths), f"--kb {' --kb '.join(paths)}: give each base once")
    sources = []
    banks = []
    for path in paths:
        bank = open_bank(a, Path(path), model, cold_start)
        source = Live.open(bank.references, model)
        if a.filter:
            source = Only(source, wanted(a.filter))
        sources.append(source)
        banks.append(bank)
    if len(banks) == 1:
        return banks[0].references, sources[0], banks[0]
    several = Several(sources, banks)
    return several, several, several


def open_bank(a, path, model, cold_start=False):
    """The bank at `path`. If there is none: a new one without memories with cold_start, else
    UserError."""
    if Texts.exists(path):
        return MemoryBank.open(path, model)
    flags = ["--checkpoint", a.checkpoint, "--data", a.data, "--references", a.references]
    made = command("write.py", *flags, "--out", path)
    check(cold_start, f"{path}: no knowledge base here; first {made}")
    texts = corpus.References.open(Path(a.data, a.references))
    return MemoryBank.create(path, model, texts)


def wanted(filters):
    """["lang=de", ...] -> {"lang": "de", ...}"""
    for text in filters:
        check("=" in text, f"--filter {text}: give key=value")
    pairs = dict(text.split("=", 1) for text in filters)
    check(len(pairs) == len(filters), f"--filter {' --filter '.join(filters)}: each key once")
    return pairs
