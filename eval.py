"""What explicit memory is worth, in numbers: section 7's comparisons at the model's own scale.

    python eval.py --json out/demo.json           questions about references it never read
    python eval.py --data DIR --questions_file FILE

Each fact is asked for under the seven conditions below, in every wording there is. Questions are
lines of JSON, DATA/questions.jsonl, with these keys; a fact needs the first two:

    question    the text to ask
    answer      the right text
    questions   [text, ...]: all wordings of the question, if there are several
    reference   the row of the reference that tells the answer; without it, the condition `oracle`
                and the hit rate are left out
    sentences   [text, ...]: continuations that give the answer, with what ends it: " 10 people" or
                " 10.", for " 10" is also how " 1010" begins. The answer is exact if the model's
                likeliest text begins with one of them; without sentences, if the answer stands in
                the first sentence that the model writes
    city        the name with which every answer begins; it is put after the question
    relation    facts of one relation get a column of their own

Without such a file the questions are made from references that are held out of training: sentences
cut off before their last number or name that no training text has; the answer goes on to the next
word or mark behind it (see `cloze`). So any text can be asked about.

experiments/ has more: text.py and leak.py (loss on text), choices.py, drift.py, heads.py.
"""

import argparse
import math
import re
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import corpus
from bank import MemoryBank
from common import check, command, make_directory, number, numbered_rows, run, visible, write_json
from embed import MARK
from generate import Several, generate, in_context, model_flags, open_memory, open_model
from retrieval import Given, Random
from views.explain import explain, n_heads

ANSWER = 32  # tokens, at most
CONDITIONS = dict(
    plain="no memory, no header (the plain decoder)",
    none="no memory (header, empty pool)",
    random="memories of random references",
    recalled="recalled: {embedder}, top {R}",
    quantized="recalled, vector-quantized bank",
    oracle="the right reference given",
    rag="text in context (RAG: the same {R} references)",
)
SEPARATING = ("oracle", "recalled", "rag")  # whose share of separable facts is printed
HEADS = "recalled, memories of {K} of {N} heads"  # with --memory_heads: the condition `heads`

# -- Questions --------------------------------------------------------------------------------


def load_questions(path, n):
    """The first n facts of a file of questions (see above), with all keys filled in.

    UserError names the file and the line of what is missing or of another type."""
    schema = dict(question=str, answer=str)
    cure = "give lines of JSON with question and answer (see eval.py)"
    rows = []
    for line, row in numbered_rows(path, schema, cure)[:n]:
        where = f"{path}, line {line}"
        for key in schema:
            check(is_text(row[key]), f"{where}: {key} is empty")
        for key in ("questions", "sentences"):
            texts = row.get(key, [])
            valid = isinstance(texts, list) and all(is_text(text) for text in texts)
            check(valid, f"{where}: {key} must be a list of texts")
        for key in ("city", "relation"):
            check(isinstance(row.get(key, ""), str), f"{where}: {key} must be a text")
        reference = row.get("reference", -1)
        valid = type(reference) is int and reference >= -1
        check(valid, f"{where}: reference must be the row of a reference, from 0")
        # wordings in the order of the file, each once
        wordings = dict.fromkeys([row["question"], *row.get("questions", [])])
        full = dict(
            question=row["question"],
            answer=row["answer"],
            questions=list(wordings),
            sentences=list(dict.fromkeys(row.get("sentences", []))),
            city=row.get("city", ""),
            relation=row.get("relation", ""),
            reference=reference,
            fact=len(rows),
        )
        rows.append(full)
    return rows


def is_text(x):
    return isinstance(x, str) and x.strip() != ""


def every_wording(rows):
    """One row for each wording of each fact: what is asked in the end."""
    return [dict(row, question=text) for row in rows for text in row["questions"]]


# A number, or a word; marks belong to their letter, though Python's \w has them not
WORD = re.compile(rf"\d+(?:[.,]\d+)*|(?:[^\W\d_][{MARK}]*)+")
NEXT = re.compile(rf"\s+(?:[\w{MARK}]+|\S)?")  # a space and what follows it
TRAINING = ("train", "explicit")  # the splits that models are trained on
JOINS = ("-", "'", "’", "_", "/", ".", "@")  # between the parts of a longer word
SHORTEST = 5  # letters of an item's question
LONGEST = 40  # letters of its answer: more is a clause of a script without spaces


def cloze(texts, is_new, n):
    """Up to n items from texts {reference: text}: sentences cut off before what is new.

    What is new is the last number or name of a sentence (see `last_new`). The sentence to give goes
    on to the word or mark behind it: else "10" would be right for who says 1010. Each reference
    gives one item.
    """
    rows = []
    for i, text in texts.items():
        for sentence in corpus.sentences(text):
            sentence = sentence.lstrip()
            at = last_new(sentence, is_new)
            if at is None:
                continue
            start, end = at
            answer = sentence[start:end]
            question = sentence[:start].rstrip()
            row = dict(question=question, answer=answer, questions=[question], city="")
            row["sentences"] = [sentence[len(question) : end] + beginning(sentence[end:])]
            row["relation"] = "number" if answer[0].isdigit() else "word"
            rows.append(dict(row, reference=i, fact=len(rows)))
            break
        if len(rows) == n:
            break
    return rows


def last_new(sentence, is_new):
    """(start, end) of the last number or name of a sentence that is new, or None.

    is_new: words in lower case. A name begins with a capital; in a script without capitals any word
    counts. Something stands before it and behind it, and it is no part of a longer word.

    >>> last_new("Oulu has 20 people.", {"oulu", "20", "people"})
    (9, 11)
    >>> last_new("It was the 1990s.", {"1990", "s"})
    """
    found = None
    for word in WORD.finditer(sentence):
        first = word[0][0]
        is_name = first.isdigit() or first.isupper() or first.lower() == first.upper()
        valid = is_name and word.start() >= SHORTEST and len(word[0]) <= LONGEST
        if valid and word[0].casefold() in is_new and stands_alone(sentence, *word.span()):
            found = word.span()
    return found


def stands_alone(sentence, start, end):
    """Whether what stands at start..end is a word of its own, and neither a title nor the end.

    >>> stands_alone("COVID-19 came", 6, 8), stands_alone("It has 19 words", 7, 9)
    (False, True)
    """
    before = sentence[max(0, start - 2) : start]
    after = sentence[end : end + 2]
    if after[:1] in ("", ":"):  # "Meryl Streep: ..." is a title
        return False
    # letters or digits may join on, directly or by a hyphen and the like
    if before[-1:] in JOINS:
        before = before[:1]
    if after[:1] in JOINS:
        after = after[1:]
    return not is_closed(before[-1:]) and not is_closed(after[:1])


def beginning(rest):
    """What ends a word: the mark or letter behind it, or the space and the word that follow.

    >>> beginning(" people live there."), beginning(". So"), beginning("\\nNext")
    (' people', '.', '\\n')
    """
    if rest[0] in " \t\xa0":
        return NEXT.match(rest)[0]
    return rest[0]


def new_words(texts, tokenizer, data, progress=True):
    """The words of texts (in lower case) that no training text of the data set has.

    If there is no training text here: the words that only one of the texts has."""
    n_texts = Counter()  # that have a word
    for text in texts:
        n_texts.update({word.casefold() for word in WORD.findall(text)})
    words = set(n_texts)
    splits = [split for split in TRAINING if Path(data, f"{split}.bin").exists()]
    if not splits:
        print(f"{data} has no training text here: asking for rare words, which it may contain")
        words = {word for word, n in n_texts.items() if n == 1}
    block = 1 << 18  # tokens
    margin = 32  # tokens that are read twice, for words that a block's end cuts
    for split in splits:
        tokens = corpus.open_tokens(data, split)
        starts = range(0, len(tokens), block)
        for start in tqdm(starts, f"words of {split}", disable=not progress, leave=False):
            said = tokenizer.decode(tokens[start : start + block + margin])
            words.difference_update(word.casefold() for word in WORD.findall(said))
    return words


def make_rows(a, references, tokenizer, seed=0):
    """Items from the references that are held out of training, in random order (see cloze)."""
    ids = references.live()
    if a.references == "kb":  # the manifest says how many of the first references are held out
        heldout = corpus.manifest(a.data).get("heldout") or len(references)
        ids = ids[ids < heldout]
    order = np.random.default_rng(seed).permutation(ids)
    candidates = order[: 20 * a.questions].tolist()  # enough, and no more than that
    texts = {i: tokenizer.decode(references[i]) for i in candidates}
    is_new = new_words(texts.values(), tokenizer, a.data)
    return cloze(texts, is_new, a.questions)


def find_rows(a, references, tokenizer):
    """The facts to ask for: from --questions_file, from the data set, or made from references."""
    path = a.questions_file or f"{a.data}/questions.jsonl"
    if a.questions_file or Path(path).exists():
        rows = load_questions(path, a.questions)
    else:
        print(f"{path} is not there: the items are sentences of references, cut off")
        rows = make_rows(a, references, tokenizer)
        line = f"{a.data}/{a.references}: no sentence with a number or name that training lacks"
        check(rows, f"{line}; give --questions_file FILE")
    live = {-1, *references.live().tolist()}  # -1: not known
    for row in rows:
        line = f"{path}: {row['question'][:40]!r} names reference {row['reference']}"
        there = f"{line}, which {a.data}/{a.references} has not, of {len(references):,}"
        check(row["reference"] in live, there)
    return rows


# -- Asking -----------------------------------------------------------------------------------


class Asker:
    """Asks questions under a condition: exactness, nats and time of each answer."""

    def __init__(self, model, tokenizer, references, retriever, bank, codes=None, heads=None):
        self.model = model
        self.heads = heads  # the only ones with memories under the condition of this name
        self.tokenizer = tokenizer
        self.references = references
        self.live = references.live()  # those that are not deleted
        self.retriever = retriever
        self.bank = bank
        self.codes = codes  # the bank, vector-quantized

    def prompt(self, row, condition):
        """-> prompt tokens: the question, and the name with which its answer begins.

        RAG reads in the plain format, best reference first: the implicit stage has taught the
        model to read so, and it answers best so (with the header it loses a third)."""
        cfg = self.model.config
        bos = self.tokenizer.bos
        prompt = self.tokenizer.encode(row["question"])
        if row["city"]:
            prompt = prompt + self.tokenizer.encode(row["city"])
        if condition == "rag":
            query = [bos, *prompt][-cfg.chunk_len :]  # so the references are those recalled
            ids = self.retriever.search([query], cfg.n_recall)[0][0]  # (R,)
            texts = [[int(t) for t in self.references[int(i)]] for i in ids if i >= 0]
            prompt = in_context(texts, prompt, cfg.max_context - 1 - self.longest(row))
        return [bos, *prompt]

    def longest(self, row):
        """How many tokens to leave free for an answer."""
        texts = row["sentences"] or [f" {row['answer']}"]
        return max([ANSWER, *(len(self.tokenizer.encode(text)) for text in texts)])

    def sources(self, rows, condition):
        """-> retriever and bank for a batch of questions, as generate takes them."""
        if condition in ("plain", "none", "rag"):
            return None, None  # nothing recalled
        if condition == "random":
            return Random(self.live, seed=rows[0]["fact"]), self.bank
        if condition == "oracle":
            return Given([[row["reference"]] for row in rows]), self.bank
        if condition == "quantized":
            return self.retriever, self.codes
        return self.retriever, self.bank

    def ask(self, rows, condition, batch=32):
        """-> for each row dict(exact, nats, found).

        Each sentence that gives the answer is followed token by token (`forced`). The answer is
        exact if in one of them every token was the likeliest: greedy generation would have written
        it, full stop included. nats: -log of the sum of their probabilities (the branches of
        Definition 2.6). found: whether the right reference was among the memories read at the
        answer's start. Rows without sentences: see `freely`; their nats are those of the bare
        answer after the question."""
        results = [dict(exact=False, nats=math.inf, found=False) for _ in rows]
        groups = defaultdict(list)  # prompts of one length, answers of one length: a batch
        free = defaultdict(list)
        for i, row in enumerate(rows):
            prompt = self.prompt(row, condition)
            for sentence in row["sentences"] or [f" {row['answer']}"]:
                answer = self.tokenizer.encode(sentence)  # with the full stop, if it has one
                groups[len(prompt), len(answer)].append((i, prompt, answer))
            if not row["sentences"]:
                free[len(prompt)].append((i, prompt))
        with self.some_heads(condition):
            for group in tqdm(groups.values(), condition, leave=False):
                for part in parts_of(group, batch):
                    self.follow(part, rows, condition, results)
            for group in free.values():
                for part in parts_of(group, batch):
                    self.freely(part, rows, condition, results)
        return results

    @contextmanager
    def some_heads(self, condition):
        """Under the condition `heads` only some heads of the model have memories."""
        config = self.model.config
        if condition == "heads":
            self.model.config = replace(config, memory_heads=self.heads)
        try:
            yield
        finally:
            self.model.config = config

    def follow(self, part, rows, condition, results):
        """One batch of ask. part: (row number, prompt, answer), of one length each."""
        numbers = [i for i, _, _ in part]
        prompts = torch.tensor([prompt for _, prompt, _ in part])  # (B, T)
        answers = torch.tensor([answer for _, _, answer in part])  # (B, n)
        retriever, bank = self.sources([rows[i] for i in numbers], condition)
        how = dict(plain=condition in ("plain", "rag"), forced=answers)
        n_new = answers.shape[1]
        trace = generate(self.model, prompts, n_new, retriever, bank, **how)[1]
        exact = trace.greedy.all(1).tolist()  # (B,)
        logp = trace.logprobs.sum(1).tolist()  # (B,)
        last = (prompts.shape[1] - 1) // self.model.config.chunk_len  # chunk of the prompt's end
        for b, i in enumerate(numbers):
            result = results[i]
            if rows[i]["sentences"]:
                result["exact"] = result["exact"] or exact[b]
            result["nats"] = -float(np.logaddexp(-result["nats"], logp[b]))
            if trace.recalls:  # of a row whose reference is not known, -1, nobody asks
                result["found"] = rows[i]["reference"] in trace.table(last + 1)[b, last]

    def freely(self, part, rows, condition, results):
        """Rows without sentences: exact if the answer stands in the first sentence written.

        part: (row number, prompt), prompts of one length."""
        numbers = [i for i, _ in part]
        prompts = torch.tensor([prompt for _, prompt in part])  # (B, T)
        retriever, bank = self.sources([rows[i] for i in numbers], condition)
        n_new = min(ANSWER, self.model.config.max_context - prompts.shape[1])
        how = dict(plain=condition in ("plain", "rag"))
        tokens, _ = generate(self.model, prompts, n_new, retriever, bank, **how)
        for b, i in enumerate(numbers):
            said = self.tokenizer.decode(tokens[b, prompts.shape[1] :])
            results[i]["exact"] = stands_in(rows[i]["answer"], said)

    def ms_per_token(self, rows, condition):
        """Milliseconds a generated token, batch 1: search, load, prefill and steps together."""
        seconds = 0.0
        n_tokens = 0
        plain = condition in ("plain", "rag")
        for row in rows:
            answer = self.tokenizer.encode((row["sentences"] or [row["answer"]])[0])
            with self.some_heads(condition):
                start = time.perf_counter()
                prompt = self.prompt(row, condition)  # for RAG this searches
                retriever, bank = self.sources([row], condition)
                tokens = torch.tensor([prompt])  # (1, T)
                generate(self.model, tokens, len(answer), retriever, bank, plain=plain)
                seconds += time.perf_counter() - start  # with what precedes the first token
            n_tokens += len(answer)
        return 1e3 * seconds / n_tokens

    def bytes_per_reference(self, condition, rows):
        """The bytes of a reference on disk; for text, the mean of the known references in UTF-8."""
        if condition in ("plain", "none"):
            return 0  # nothing is kept
        if condition == "quantized":
            return self.codes.record_bytes
        if condition == "heads":  # what a bank of such a model would have
            config = self.model.config
            n_kept = n_heads(replace(config, memory_heads=self.heads))
            return self.bank.record_bytes * n_kept // n_heads(config)
        if condition != "rag":
            return self.bank.record_bytes
        listed = [row["reference"] for row in rows if row["reference"] >= 0]
        listed = listed or range(min(100, len(self.references)))
        texts = [self.tokenizer.decode(self.references[i]) for i in listed]
        return float(np.mean([len(text.encode()) for text in texts]))


def parts_of(group, batch):
    return [group[i : i + batch] for i in range(0, len(group), batch)]


def stands_in(answer, said):
    """Whether the answer stands in the first sentence of what was said, as words of their own.

    >>> stands_in("4242", " It has 4242 people. And so on"), stands_in("42", " It has 4242 people.")
    (True, False)
    >>> stands_in("3.5", " It is 3.5 m long.")
    True
    """
    sentence = [*corpus.sentences(said.strip()), ""][0].casefold()
    pattern = re.escape(answer.strip().casefold())
    # No letter or digit may join on. In a script without capitals words do stand side by side.
    if is_closed(answer.strip()[0]):
        pattern = r"(?<!\w)" + pattern
    if is_closed(answer.strip()[-1]):
        pattern = pattern + r"(?!\w)"
    return re.search(pattern, sentence) is not None


def is_closed(letter):
    """Whether a letter or digit cannot stand beside a word without belonging to it."""
    return letter.isdigit() or letter.lower() != letter.upper()


def measure(asker, rows, conditions=tuple(CONDITIONS), timed=24):
    """Asks all wordings of all facts. rows: as load_questions gives them.

    -> {condition: dict(exact={"all", ...}, found, nats, separable, bytes_..., ms_per_token)}
    exact, found, nats: means over all wordings.

    separable (Definition 2.6): the share of facts that in every wording have p <= 1/2 without
    memory and p >= 0.9 under the condition. The definition asks, for any realization, that one of
    the answer's tokens have p <= 1/2 without, and that all have p >= 0.9 with. Here p = exp(-nats)
    is that of the whole answer, summed over its sentences (the definition's branches). So our
    p >= 0.9 is stricter (no factor is below the product), and our p <= 1/2 is weaker (0.7 x 0.7).
    """
    asked = every_wording(rows)
    facts = np.array([row["fact"] for row in asked])
    answers = {c: asker.ask(asked, c) for c in dict.fromkeys(["none", *conditions])}
    p = {c: np.exp([-answer["nats"] for answer in answers[c]]) for c in answers}
    table = {}
    for condition in conditions:
        exact = defaultdict(list)
        for answer, row in zip(answers[condition], asked, strict=True):
            exact["all"].append(answer["exact"])
            if row["relation"]:
                exact[row["relation"]].append(answer["exact"])
        failed = (p["none"] > 0.5) | (p[condition] < 0.9)
        n_failed = len(np.unique(facts[failed]))  # facts that one of their wordings fails
        found = [answer["found"] for answer in answers[condition]]
        nats = [answer["nats"] for answer in answers[condition]]
        means = {relation: float(np.mean(each)) for relation, each in exact.items()}
        measured = dict(exact=means)
        measured["found"] = float(np.mean(found))
        measured["nats"] = float(np.mean(nats))
        measured["separable"] = 1 - n_failed / len(rows)
        measured["bytes_per_reference"] = asker.bytes_per_reference(condition, rows)
        measured["ms_per_token"] = asker.ms_per_token(asked[:timed], condition)
        table[condition] = measured
    return table


def columns(*lines):
    """A table in Markdown from lists of cells, the head first: names left, numbers right."""
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    rule = "|---|" + "--:|" * (len(lines[0]) - 1)
    return "\n".join([rows[0], rule, *rows[1:]])


def markdown(table, names):
    """The table of conditions, as the README shows it."""
    relations = list(next(iter(table.values()))["exact"])
    lines = [["condition", *relations, "nats per answer", "bytes per reference", "ms per token"]]
    for condition, row in table.items():
        cells = [names[condition]]
        cells += [f"{row['exact'][relation]:.3f}" for relation in relations]
        cells.append(f"{row['nats']:.2f}")
        cells.append(f"{row['bytes_per_reference']:,.0f}")
        cells.append(f"{row['ms_per_token']:.1f}")
        lines.append(cells)
    return columns(*lines)


# -- Command line -----------------------------------------------------------------------------


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    model_flags(p)
    p.add_argument(
        "--memory_heads", help="also ask with memories of these heads only: 3.0,3.1 (layer.head)"
    )
    p.add_argument("--questions_file", help="questions to ask (None: DATA/questions.jsonl)")
    p.add_argument(
        "--questions", type=number(int, 1), default=600, help="how many facts to ask for"
    )
    p.add_argument("--examples", type=number(int, 0), default=3, help="answers to show in full")
    json_flag(p)
    return p


def json_flag(parser):
    parser.add_argument("--json", help="a file to write the results to")


def prepare_json(a):
    """Refuses a --json that cannot be written: now, not after the work."""
    if a.json:
        check(not Path(a.json).is_dir(), f"--json {a.json} is a directory: give a file")
        make_directory(Path(a.json).parent)


def write_result(a, result):
    if a.json:
        write_json(a.json, result)
        print(f"\nwritten to {a.json}")


def open_codes(a, bank):
    """The vector-quantized memories. If there are none it says so and returns None."""
    if isinstance(bank, Several):
        print("vector-quantized memories are left out: not of several bases at once")
        return None
    if not bank.quantized:
        flags = ["--checkpoint", a.checkpoint, "--out", bank.path, "--quantize"]
        made = command("write.py", *flags)
        print(f"vector-quantized memories are left out: there are none; first {made}")
        return None
    return MemoryBank.open(bank.path, bank.model, codes=True)


def show_examples(rows, asker):
    """Answers written freely, not forced, with the memories they read."""
    for row in rows:
        tokens = [asker.tokenizer.bos, *asker.tokenizer.encode(row["question"])]
        prompt = torch.tensor([tokens])  # (1, T)
        stop = asker.tokenizer.encoding.encode_ordinary(".")[0]
        n_new = min(ANSWER, asker.model.config.max_context - len(tokens))
        out, trace = generate(asker.model, prompt, n_new, asker.retriever, asker.bank, stop=stop)
        answer = asker.tokenizer.decode(out[0, len(tokens) :]).strip()
        lines = [f"\n{row['question']}", f" -> {answer}", f"    (truth: {row['answer']})"]
        lines += explain(asker.model, asker.tokenizer, asker.references, out, trace, asker.bank)
        print(visible("\n".join(lines)))


def main(argv=None):
    a = parser().parse_args(argv)
    prepare_json(a)
    started = time.time()
    model, tokenizer = open_model(
        a.checkpoint, a.data, a.device, n_recall=a.n_recall, verify=not a.no_verify
    )
    references, retriever, bank = open_memory(a, model)
    codes = open_codes(a, bank)
    rows = find_rows(a, references, tokenizer)
    asker = Asker(model, tokenizer, references, retriever, bank, codes, a.memory_heads)
    check_lengths(asker, rows)
    names = conditions_of(asker, rows)
    n_asked = len(every_wording(rows))
    print(f"{len(rows):,} facts, {n_asked:,} wordings, {len(references):,} references")
    table = measure(asker, rows, names)
    print(f"\n{markdown(table, names)}\n")
    found = {condition: row.pop("found") for condition, row in table.items()}
    hit_rate = found["recalled"] if "oracle" in names else None  # where references are known
    if hit_rate is not None:
        top = f"among the top {model.config.n_recall}"
        print(f"hit rate: the right reference is {top} for {hit_rate:.3f} of the wordings")
    print(
        "separable facts (Definition 2.6: in every wording p <= 1/2 without memory, >= 0.9 with):"
    )
    shares = [f"{c} {table[c]['separable']:.3f}" for c in SEPARATING if c in table]
    print(f"    {', '.join(shares)}")
    print(bank.stats())
    show_examples(rows[: a.examples], asker)
    result = dict(conditions=table, hit_rate=hit_rate, questions=len(rows), wordings=n_asked)
    result |= dict(references=len(references), seconds=time.time() - started)
    write_result(a, result)
    return result


def conditions_of(asker, rows):
    """{condition: its name in the table} of those to ask under; prints what is left out."""
    config = asker.model.config
    words = dict(R=config.n_recall, embedder=asker.retriever.meta["embedder"])
    names = {}
    for condition, text in CONDITIONS.items():
        names[condition] = text.format(**words)
        if condition == "recalled" and asker.heads:
            reduced = replace(config, memory_heads=asker.heads)  # refuses what is no head
            names["heads"] = HEADS.format(K=n_heads(reduced), N=n_heads(config))
    if asker.codes is None:  # open_codes has said why
        del names["quantized"]
    if any(row["reference"] < 0 for row in rows):
        del names["oracle"]
        print("the right reference: left out, for not every question names it")
    return names


def check_lengths(asker, rows):
    """UserError for a question that leaves no room for its answer."""
    most = asker.model.config.max_context
    for row in every_wording(rows):
        prompt = asker.prompt(row, "none")
        texts = row["sentences"] or [f" {row['answer']}"]
        n_new = max(len(asker.tokenizer.encode(text)) for text in texts)
        line = f"{row['question'][:40]!r}: {len(prompt)} tokens and {n_new} of its answer"
        check(len(prompt) + n_new <= most, f"{line} are more than max_context = {most}")


if __name__ == "__main__":
    run(main)
