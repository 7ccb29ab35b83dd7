"""A knowledge base that lives: its texts added, edited, deleted, searched and swapped (sec. 7.4).

    python kb.py new    --kb out/mine.kb                     makes an empty one for the model
    python kb.py add    --kb out/mine.kb towns.txt more.jsonl       a reference a paragraph or row
    python kb.py search --kb out/mine.kb "Zubrowka City"
    python kb.py replace --kb out/mine.kb 17 "Zubrowka City has 4243 people."
    python kb.py delete --kb out/mine.kb 17 18
    python sample.py --prompt "..." --kb out/mine.kb --kb out/cities/kb.bank

Every change is a transaction: a kill leaves the base as it was before or after it, and other
processes may read and change the base meanwhile. The work is done in bank.py and retrieval.py.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import corpus
from bank import MemoryBank, Texts
from common import (
    check,
    command,
    decode,
    find_device,
    number,
    numbered_rows,
    read_rows,
    read_text,
    replace_file,
    run,
    visible,
)
from embed import KINDS
from generate import BANK, has_word, wanted
from model import load_checkpoint
from retrieval import Live, Only, Relevance, choice, is_index

BATCH = 1000  # texts of a transaction
NEAR = 0.8  # from this similarity on, a text may say the same as an old one
HERE = BANK.format(data="cities", references="kb")

# -- Reading texts -----------------------------------------------------------------------------


def read_file(name, by):
    """Yields (text, source) of a file: of a .jsonl file its rows, with "text" and whatever else; of
    another one paragraphs, lines or the whole, as `by` says. "-": standard input."""
    cure = 'give a text file, or a .jsonl file with rows like {"text": "..."}'
    if name == "-":
        text = decode(sys.stdin.buffer.read(), "standard input", "give UTF-8")
        yield from cut(text, by, "standard input")
    elif name.endswith(".jsonl"):
        for line, row in numbered_rows(name, dict(text=str), cure):
            text = row.pop("text")
            yield text, dict(file=name, line=line) | row  # what the row says of these comes first
    else:
        yield from cut(read_text(name, cure), by, name)


def cut(text, by, name):
    """Yields (text, source) of the paragraphs or lines of a text, or of all of it."""
    if by == "document":
        yield text.strip(), dict(file=name, line=1)
        return
    mark = r"\n[ \t]*\n\s*" if by == "paragraph" else r"\n"
    line = 1
    at = 0
    for end in [*re.finditer(mark, text), None]:
        piece = text[at : end.start() if end else len(text)]
        first = line + piece[: len(piece) - len(piece.lstrip())].count("\n")
        if piece.strip():
            yield piece.strip(), dict(file=name, line=first)
        line += piece.count("\n")
        if end:
            line += end.group().count("\n")
            at = end.end()


# -- Opening -----------------------------------------------------------------------------------


def open_model(a):
    return load_checkpoint(a.checkpoint)[0].to(find_device(a.device)).eval()


def open_base(a):
    """The base with its model: a text that changes gets its memory at once."""
    return MemoryBank.open(a.kb, open_model(a))


def searcher(a):
    """The model that --embedder self:LAYER.HEAD searches with; None for an index of texts."""
    name = getattr(a, "embedder", None) or choice(a.kb)[0]
    return open_model(a) if name.startswith("self:") else None


def show(texts, tokenizer, ids):
    """Prints references: id, text, source."""
    for text in texts.rows(ids):
        words = tokenizer.decode(texts.tokens(text)).strip() if text.live else "(deleted)"
        print(visible(f"{text.id}  {words}"))
        if text.live:
            print(visible(f"    {texts.origin(text.id)}"))


def matching(texts, filters):
    """The ids of the live references whose source says what the filters want."""
    ids = texts.live()
    if not filters:
        return ids
    keys = wanted(filters)
    found = []
    for start in range(0, len(ids), 1024):
        rows = texts.rows(ids[start : start + 1024])
        found += [text.id for text in rows if text.says(keys)]
    return np.array(found, np.int64)


# -- The commands ------------------------------------------------------------------------------


def new(a):
    """Makes an empty knowledge base for the model, with the tokenizer of --data."""
    if Texts.exists(a.kb):  # one whose making was cut short has neither texts nor an index
        complete = len(Texts(a.kb)) or is_index(Path(a.kb, "index"))
        check(not complete, f"--kb {a.kb} is there already: give another path")
    tokenizer = corpus.tokenizer(a.data)
    model = open_model(a)
    equal = tuple(tokenizer.header) == model.config.header
    check(equal, f"--data {a.data} has another tokenizer than {a.checkpoint} was trained with")
    none = corpus.References(Path(a.data, "new"), np.zeros(0), np.zeros(1), tokenizer.n_vocab)
    bank = MemoryBank.create(a.kb, model, none, a.dtype)
    Live.build(bank.references, a.embedder, progress=False, model=model)
    fill = command("kb.py", "add", "--kb", a.kb)
    print(f"{a.kb}: an empty knowledge base; fill it with: {fill} FILE")


def add(a):
    """Adds texts from files or standard input. Names each that is very near an old one."""
    bank = open_base(a)
    live = Live.open(bank.references, bank.model)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
    given = []  # (tokens, source); read before anything is written: a bad file changes nothing
    for name in a.files or ["-"]:
        for text, source in read_file(name, a.by):
            for tokens in corpus.fit(text, live.tokenizer, bank.references.ref_len):
                given.append((tokens, dict(time=stamp) | source))
    check(given, f"{', '.join(a.files or ['standard input'])}: no text in it")
    began = time.time()
    first = len(bank)
    n_near = 0
    steps = range(0, len(given), BATCH)
    for start in tqdm(steps, f"{BATCH} texts", disable=len(given) < BATCH):
        part = given[start : start + BATCH]
        # before they are added, else each would be nearest to itself
        near = live.nearest([tokens for tokens, _ in part], 1) if a.near else None
        ids = bank.add([tokens for tokens, _ in part], [source for _, source in part])
        if near:
            n_near += report_near(a, live, ids, *near, shown=n_near)
    live.save()
    n_new = len(bank) - first
    rate = len(given) / (time.time() - began)
    n_known = len(given) - n_new
    print(
        f"{a.kb}: {n_new:,} added, {n_known:,} known before; {rate:,.0f} texts/s, memories included"
    )
    if n_near > 10:
        print(f"{n_near:,} are near old ones (similarity from {a.near}); 10 were shown")


def report_near(a, live, ids, near, scores, shown):
    """Prints which new texts are near an older one, 10 at most; returns how many are."""
    n_near = 0
    for i, (old,), (score,) in zip(ids, near.tolist(), scores.tolist(), strict=True):
        if old < 0 or old == i or score < a.near:  # none, the same text, or another one
            continue
        n_near += 1
        if shown + n_near <= 10:
            old_text = live.tokenizer.decode(live.references[old]).strip()
            text = live.tokenizer.decode(live.references[i]).strip()
            print(visible(f"{i} is near {old} (similarity {score:.2f}): {old_text}"))
            put = command("kb.py", "replace", "--kb", a.kb, "--source", i, old, text)
            drop = command("kb.py", "delete", "--kb", a.kb, i)
            print(visible(f"  if it takes its place: {put} && {drop}"))
    return n_near


def replace(a):
    """Gives a reference another text; a deleted one lives again. It keeps what its source says, or
    takes over what that of another one says (--source)."""
    check(has_word(a.text), f"the text {a.text!r}: there is no word in it; delete forgets a text")
    bank = open_base(a)
    tokenizer = corpus.tokenizer(a.kb)
    pieces = corpus.fit(a.text, tokenizer, bank.references.ref_len)
    line = f"the text is {len(pieces)} references long; the model takes {bank.references.ref_len}"
    check(len(pieces) == 1, f"{line} tokens a reference: give a shorter one, or add the rest")
    source = bank.references.source(a.id if a.source is None else a.source)
    source["time"] = time.strftime("%Y-%m-%dT%H:%M:%S")
    same = bank.references.find(pieces[0])
    bank.replace(a.id, pieces[0], source)
    show(bank.references, tokenizer, [a.id])
    if same not in (None, a.id):
        drop = command("kb.py", "delete", "--kb", a.kb, same)
        print(f"{same} is the same text; to have it once: {drop}")


def delete(a):
    """Forgets references: when this returns, their tokens and memories are overwritten."""
    bank = MemoryBank.open(a.kb)  # no model: nothing is encoded
    bank.delete(a.ids)
    print(f"forgotten: {', '.join(map(str, a.ids))} (their vectors stay in the index, unused, and")
    print(f"traces in free pages, until: {command('kb.py', 'compact', '--kb', a.kb)})")


def forget_like(a):
    """Forgets the references similar to a text. Shows them first, and asks (unless --yes)."""
    bank = MemoryBank.open(a.kb)
    live = Live.open(bank.references, searcher(a))
    ids, scores = live.nearest([a.text], max(1, len(live)))
    found = ids[0][(ids[0] >= 0) & (scores[0] >= a.near)].tolist()
    check(found, f"{a.kb}: nothing is as similar as {a.near}: give a smaller --near")
    show(bank.references, live.tokenizer, found)
    if not a.yes:
        # where nobody can answer, nothing is deleted
        check(sys.stdin.isatty(), f"{len(found)} would be forgotten: add --yes to forget them")
        answer = input(f"forget these {len(found)}? [y/N] ")
        if answer.strip().lower() != "y":
            print("nothing was forgotten")
            return
    a.ids = found
    delete(a)


def list_texts(a):
    """Shows the references in order, or those whose source has key=value (--filter)."""
    texts = Texts(a.kb)
    ids = matching(texts, a.filter)
    show(texts, corpus.tokenizer(a.kb), ids[a.start : a.start + a.limit])
    print(f"{len(ids):,} references")


def show_texts(a):
    """Shows some references with their sources."""
    show(Texts(a.kb), corpus.tokenizer(a.kb), a.ids)


def search(a):
    """Shows the references that a text would recall, best first."""
    from_here = Live.open(Texts(a.kb), searcher(a))
    source = from_here
    if a.filter:
        source = Only(from_here, wanted(a.filter))
    ids, scores = source.search([a.text], a.k)
    for i, score in zip(ids[0].tolist(), scores[0].tolist(), strict=True):
        if i >= 0:
            print(f"similarity {score:.2f}", end="  ")
            show(from_here.references, from_here.tokenizer, [i])
    if (ids < 0).all():
        print("the knowledge base knows nothing about this")


def verify(a):
    """Checks every text, every memory and the index; says what is missing and how to mend it."""
    bank = MemoryBank.open(a.kb)
    bank.references.verify()
    print(f"texts: {bank.references.count_live():,} whole")
    opened = dict(memories=bank)
    if bank.quantized:
        opened["codes"] = MemoryBank.open(a.kb, codes=True)
    for name, one in opened.items():
        missing = len(one.verify())
        flags = ["--checkpoint", a.checkpoint, "--out", a.kb]
        flags += ["--quantize"] if name == "codes" else []
        cure = f"; {command('write.py', *flags)} writes them" if missing else ""
        print(f"{name}: {missing:,} missing or damaged{cure}")
    live = Live.open(bank.references, searcher(a))
    print(f"index: {len(live):,} references, {live.embedder.id}")


def compact(a):
    """Rewrites texts and index without what was deleted: no file holds any of it afterwards."""
    model = searcher(a)
    bank = MemoryBank.open(a.kb, model)
    before = size_of(a.kb)
    bank.compact()
    # the index as well: vectors of deleted texts are hidden in it, and word counts remember them
    how = dict(progress=bank.references.count_live() >= BATCH, model=model, bank=bank)
    live = Live.build(bank.references, **how)
    if live.relevance:
        live.save_relevance()
    Path(a.kb, f"{Relevance.FILE}.tmp").unlink(missing_ok=True)  # left by a kill
    print(f"{a.kb}: {before:,} bytes before, {size_of(a.kb):,} now")


def size_of(folder):
    """The bytes that the files of a directory take on the disk."""
    return sum(file.stat().st_blocks * 512 for file in Path(folder).rglob("*") if file.is_file())


def merge(a):
    """Adds the references of another base, with their sources, except those known already."""
    bank = open_base(a)
    other = Texts(a.other)
    equal = other.meta["tokenizer_id"] == bank.meta["tokenizer_id"]
    check(equal, f"{a.other} has another tokenizer than {a.kb}")
    longest = bank.references.ref_len
    line = f"{a.other} has references of up to {other.ref_len} tokens, {a.kb} takes {longest}"
    check(other.ref_len <= longest, f"{line}: export it, and add that")
    first = len(bank)
    ids = other.live()
    for start in tqdm(range(0, len(ids), BATCH), f"{BATCH} texts", disable=len(ids) < BATCH):
        texts = [text for text in other.rows(ids[start : start + BATCH]) if text.live]
        # "base": whose it was, should the two ever have to be told apart again
        sources = [dict(json.loads(text.source), base=str(a.other)) for text in texts]
        bank.add([other.tokens(text) for text in texts], sources)
    Live.open(bank.references, bank.model).save()
    print(f"{a.kb}: {len(bank) - first:,} of {len(ids):,} added; the others were known")


def export(a):
    """Writes all live references as lines of JSON: reference (its id), text, and all that its
    source says."""
    texts = Texts(a.kb)
    tokenizer = corpus.tokenizer(a.kb)
    ids = matching(texts, a.filter)
    inside = Path(a.kb).resolve() in Path(a.out).resolve().parents
    check(not inside, f"--out {a.out} lies in the knowledge base: give a file elsewhere")

    def write(file):
        for i in tqdm(ids.tolist(), "references", disable=len(ids) < BATCH):
            (text,) = texts.rows([i])
            if not text.live:
                continue  # deleted meanwhile
            words = tokenizer.decode(texts.tokens(text)).strip()
            row = json.loads(text.source) | dict(reference=i, text=words)
            line = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "backslashreplace"))

    replace_file(a.out, write)
    print(f"{a.out}: {len(ids):,} references")


def stats(a):
    """Shows how much is in the knowledge base, and which model's memories these are."""
    bank = MemoryBank.open(a.kb)
    texts = bank.references
    n = texts.count_live()
    n_deleted = len(texts) - n
    dtype = bank.meta["dtype"]
    print(f"{a.kb}: {n:,} references, {n_deleted:,} deleted, {texts.version:,} changes so far")
    print(f"memories: {bank.record_bytes:,} bytes each ({dtype} {bank.shape})")
    if bank.quantized:
        spec = bank.codes.codec.spec
        print(f"codes: {bank.codes.record_bytes:,} bytes each ({spec})")
    writer = bank.meta["fingerprint"]
    tokenizer_id = bank.meta["tokenizer_id"]
    print(f"model: {writer}; tokenizer: {tokenizer_id}")
    print(f"disk: {size_of(a.kb):,} bytes")


def index(a):
    """Makes the index anew: after damage, or with another embedder."""
    model = searcher(a)
    line = "--factory: not with --embedder self:, whose keys have their own"
    check(not (model and a.factory), line)
    bank = MemoryBank.open(a.kb, model)
    live = Live.build(bank.references, a.embedder, a.factory, model=model, bank=bank)
    kind = live.meta.get("factory", "keys of the memories")
    print(f"{live.path}: {len(live):,} references, {live.embedder.id}, {kind}")


def calibrate(a):
    """Learns from questions when the base knows nothing about one, so that nothing is recalled
    then. --questions, --test: rows with "question" and "reference", the id that answers it; a row
    without "reference" is a question that no reference answers."""
    live = Live.open(Texts(a.kb), searcher(a))
    asked = []
    for name in a.questions:
        asked += read_questions(name, live.references)
    answerable = [row for row in asked if row[1] is not None]
    unanswerable = [question for question, i in asked if i is None]
    kept, wrong = live.calibrate(answerable, unanswerable, a.keep)
    print(f"of questions that did not teach it: {kept:.3f} of the answerable still find something,")
    print(f"{1 - wrong:.3f} of the unanswerable are recognised ({len(answerable):,} answerable)")
    for name in a.test:
        report_test(name, live)


def read_questions(name, texts):
    """[(question, id of the reference that answers it or None), ...] of a .jsonl file, without
    those whose reference has been deleted."""
    cure = 'give .jsonl rows like {"question": "...", "reference": 17}'
    rows = read_rows(name, dict(question=str), cure)
    there = set(texts.live().tolist())
    n = len(texts)
    asked = []
    for row in rows:
        i = row.get("reference")
        valid = i is None or (type(i) is int and 0 <= i < n)
        line = f"{name} names reference {i}, and {texts.path} has {n}, from 0"
        check(valid, f"{line}: name the id that answers each (kb.py list shows them)")
        if i is None or i in there:
            asked.append((row["question"], i))
    return asked


def report_test(name, live):
    """Says what becomes of questions that taught nothing: those of a file."""
    asked = read_questions(name, live.references)
    answerable = [row for row in asked if row[1] is not None]
    unanswerable = [row for row in asked if row[1] is None]
    if answerable:
        kept = live.share_found(answerable)
        missing = 1 - live.share_found(answerable, missing=True)
        line = f"{name}: {kept:.3f} of {len(answerable):,} answerable find something;"
        print(f"{line} without the references that answer them {missing:.3f} are recognised")
    if unanswerable:
        known = 1 - live.share_found(unanswerable)
        print(f"{name}: {known:.3f} of {len(unanswerable):,} unanswerable are recognised")


# -- Command line ------------------------------------------------------------------------------


def parser():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name, function, *flags, model=False):
        c = commands.add_parser(name, help=" ".join(function.__doc__.split()), **form)
        c.set_defaults(function=function)
        c.add_argument("--kb", default=HERE, help="directory of the knowledge base")
        if model:
            c.add_argument("--checkpoint", default="checkpoints/toy", help="its model")
            c.add_argument("--device", default="auto", help="cpu, cuda or auto")
        for flag, options in flags:
            c.add_argument(flag, **options)

    ids = ("ids", dict(type=number(int, 0), nargs="+", metavar="ID", help="of references"))
    text = ("text", dict(metavar="TEXT", help="in quotes"))
    share = number(float, 0, 1)
    near = ("--near", dict(type=share, default=NEAR, help="similarity; 0: name none"))
    filters = ("--filter", dict(action="append", default=[], help="key=value of the source"))
    embedder = ("--embedder", dict(default="hash", help=KINDS))
    data = ("--data", dict(default="data/cities", help="a data set with the tokenizer"))
    dtypes = ["bfloat16", "float32"]
    dtype = ("--dtype", dict(default="bfloat16", choices=dtypes, help="of the memories"))
    kinds = ["paragraph", "line", "document"]
    by = ("--by", dict(default="paragraph", choices=kinds, help="what makes a reference"))
    files = ("files", dict(nargs="*", metavar="FILE", help=".txt or .jsonl; none or -: stdin"))
    add_command("new", new, data, dtype, embedder, model=True)
    add_command("add", add, files, by, near, model=True)
    of_it = ("id", dict(type=number(int, 0), metavar="ID", help="of it"))
    source_help = "the reference whose source it gets (None: its own)"
    source = ("--source", dict(type=number(int, 0), metavar="ID", help=source_help))
    add_command("replace", replace, source, of_it, text, model=True)
    add_command("delete", delete, ids)
    yes = ("--yes", dict(action="store_true", help="do not ask first"))
    alike = ("--near", dict(type=share, default=NEAR, help="similarity from which to forget"))
    add_command("forget-like", forget_like, text, alike, yes, model=True)
    start = ("--start", dict(type=number(int, 0), default=0, help="skip so many"))
    limit = ("--limit", dict(type=number(int, 1), default=20, help="show so many"))
    add_command("list", list_texts, filters, start, limit)
    add_command("show", show_texts, ids)
    k = ("--k", dict(type=number(int, 1), default=5, help="how many to show"))
    add_command("search", search, text, filters, k, model=True)
    add_command("verify", verify, model=True)
    add_command("compact", compact, model=True)
    add_command("merge", merge, ("other", dict(metavar="OTHER", help="the other base")), model=True)
    add_command("export", export, filters, ("--out", dict(required=True, help="a .jsonl file")))
    add_command("stats", stats)
    factory = ("--factory", dict(help="FAISS factory string (None: chosen by size)"))
    again = ("--embedder", dict(help=f"{KINDS} (None: as it is, with its factory)"))
    add_command("index", index, again, factory, model=True)
    asked = ["data/cities/questions.jsonl", "data/cities/questions_reworded.jsonl"]
    questions = ("--questions", dict(nargs="+", default=asked, help=".jsonl files"))
    test = ("--test", dict(nargs="+", default=[], help=".jsonl files to measure it by as well"))
    keep = ("--keep", dict(type=share, default=0.95, help="share that is to find something"))
    add_command("calibrate", calibrate, questions, test, keep, model=True)
    return p


def main(argv=None):
    a = parser().parse_args(argv)
    a.function(a)


if __name__ == "__main__":
    run(main)
