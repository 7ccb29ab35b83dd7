"""Files of many kinds -> documents, one after the other, in little memory.

    .txt .md .rst       a file is a document
    .html .htm          a file is a document: its text, without the markup
    .jsonl .csv         a line or row is a document: one field of it
    .json               a list of objects or texts, or one object
    and each of them with .gz or .zst behind its name

A document longer than PIECE characters becomes several, cut at paragraph ends where there are any.
What is not UTF-8 is replaced by U+FFFD, and counted.
"""

import codecs
import csv
import gzip
import html.parser
import io
import json
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import UserError, check, optional
from corpus import OTHER_ENDS, SPACED_ENDS

KINDS = (".txt", ".md", ".rst", ".html", ".htm", ".jsonl", ".json", ".csv")
BY_LINE = (".txt", ".md", ".rst", ".jsonl")  # a long file of these can be read from the middle
PIECE = 20_000  # characters of a document, at most
LONGEST = 64 << 20  # bytes of a line, a row or an .html or .json file, at most
LONGEST_TITLE = 200  # characters
BLOCK = 1 << 20  # bytes read at a time


@dataclass
class Document:
    """A text, its title ("" if it has none), and where it comes from."""

    text: str
    title: str
    file: str
    place: str  # where in the file: names the document, for the choice of splits
    broken: int = 0  # characters that were no UTF-8


@dataclass
class Part:
    """What one process reads at a time: some files, or bytes start..end of a long one."""

    files: list
    start: int = 0
    end: int | None = None
    bytes: int = 0  # about so many are read


# -- Which files ------------------------------------------------------------------------------


def kind_of(path):
    """(".jsonl", ".gz") of x.jsonl.gz; the second is "" for a file that is not compressed."""
    name = Path(path).name.lower()
    packed = ""
    for suffix in (".gz", ".zst"):
        if name.endswith(suffix):
            packed = suffix
            name = name.removesuffix(suffix)
    return os.path.splitext(name)[1], packed


def find_files(paths, leave_out=None):
    """All files of known kinds under `paths`, in a fixed order, and a Counter of what was skipped.

    Names that begin with a dot are skipped, and the directory `leave_out` with all that is in it
    (the output must not become input). Links to directories are not followed.
    """
    files = []
    skipped = Counter()
    hidden = os.path.abspath(leave_out) if leave_out else None
    for path in map(Path, paths):
        check(path.exists(), f"{path}: no such file or directory")
        if path.is_file():
            known = kind_of(path)[0] in KINDS
            check(known, f"{path}: not one of {' '.join(KINDS)} (.gz, .zst)")
            files.append(path)
            continue

        def unreadable(error):
            skipped["folders that may not be read"] += 1

        for folder, folders, names in os.walk(path, onerror=unreadable):
            if os.path.abspath(folder) == hidden:
                folders.clear()  # os.walk goes no deeper here
                continue
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if name.startswith("."):
                    continue
                if kind_of(name)[0] not in KINDS:
                    skipped[kind_of(name)[0] or "no suffix"] += 1
                elif not os.path.isfile(Path(folder, name)):
                    skipped["links to nowhere, pipes and devices"] += 1
                else:
                    files.append(Path(folder, name))
    return list(dict.fromkeys(files)), skipped  # a file that was given twice is read once


def make_parts(files, most=8 << 20):
    """The files in parts of about `most` bytes: small ones together, long ones in stretches."""
    parts = []
    part = Part([])
    for path in files:
        size = path.stat().st_size
        kind, packed = kind_of(path)
        # Only where lines are lines: a quoted field of a table may have line ends in it, a packed
        # file has no middle, and in UTF-16 a line end is two bytes.
        if size > most and kind in BY_LINE and not packed and not _is_utf16(path):
            for start in range(0, size, most):
                end = min(start + most, size)
                parts.append(Part([path], start, end, end - start))
            continue
        is_full = part.bytes + size > most or len(part.files) == 1000
        if part.files and is_full:
            parts.append(part)
            part = Part([])
        part.files.append(path)
        part.bytes += size
    if part.files:
        parts.append(part)
    return parts


# -- Documents of a part ----------------------------------------------------------------------


def read_documents(part, field="text", title_field="title", counts=None):
    """Yields the Documents of a part. counts: a Counter of what could not be read, and why.

    field, title_field: of the objects of .jsonl and .json and the rows of .csv.
    """
    counts = Counter() if counts is None else counts
    for path in part.files:
        kind, packed = kind_of(path)
        try:
            with _open(path, packed) as stream:
                if kind in (".jsonl", ".csv", ".json"):
                    records = _records(stream, kind, path, part, counts)
                    made = _from_records(records, field, title_field, path, counts)
                elif kind in (".html", ".htm"):
                    made = _from_html(stream, path, counts)
                else:
                    made = _from_text(stream, kind, path, part)
                for document in made:
                    yield from _pieces(document)
                if packed and stream.raw.damaged:
                    counts[f"{path} is cut off or damaged; what came before is read"] += 1
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _open(path, packed):
    """The bytes of a file, unpacked."""
    file = open(path, "rb")
    if packed == ".gz":
        damage = (EOFError, zlib.error, gzip.BadGzipFile)
        return io.BufferedReader(UpToDamage(gzip.GzipFile(fileobj=file), file, damage))
    if packed == ".zst":
        damage = (EOFError, optional("zstandard").ZstdError)
        return io.BufferedReader(UpToDamage(Unzst(file), file, damage))
    return file


class UpToDamage(io.RawIOBase):
    """The bytes of a stream that unpacks a file, up to where that is cut off or damaged."""

    def __init__(self, stream, file, damage):
        self.stream = stream
        self.file = file
        self.damage = damage  # the errors that say so
        self.damaged = False

    def readable(self):
        return True

    def readinto(self, out):
        try:
            data = self.stream.read(min(len(out), 1 << 13))  # what is lost is less than that
        except self.damage:
            self.damaged = True
            return 0
        out[: len(data)] = data
        return len(data)

    def close(self):
        self.file.close()
        super().close()


class Unzst:
    """The bytes of a .zst file of any number of frames; EOFError if the last one is cut off."""

    WINDOW = 1 << 30  # bytes that a frame may look back: zstd --long=30
    STEP = 1 << 12  # bytes that are unpacked at a time: they may become many

    def __init__(self, file):
        self.file = file
        self.library = optional("zstandard")
        self.frame = None  # what unpacks the frame that is open
        self.packed = b""
        self.held = b""  # unpacked, and not yet given out

    def read(self, n):
        while not self.held:
            self.packed = self.packed or self.file.read(self.STEP)
            if not self.packed:
                if self.frame:
                    raise EOFError
                return b""
            if self.frame is None:
                unpack = self.library.ZstdDecompressor(max_window_size=self.WINDOW)
                self.frame = unpack.decompressobj()
            self.held = self.frame.decompress(self.packed)
            self.packed = b""
            if self.frame.eof:
                self.packed = self.frame.unused_data
                self.frame = None
        data = self.held[:n]
        self.held = self.held[n:]
        return data


UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _is_utf16(path):
    """Whether a file begins with the mark of UTF-16, which some editors call Unicode."""
    with open(path, "rb") as stream:
        return stream.read(2) in UTF16


def _decoder(first):
    """A decoder for a file that begins with these bytes: UTF-8 unless a mark says UTF-16."""
    if first.startswith(UTF16):
        return codecs.getincrementaldecoder("utf-16")("replace")
    return codecs.getincrementaldecoder("utf-8-sig")("replace")


def _texts(stream, limit=None):
    """Yields (text, characters replaced) block by block; at most `limit` bytes, if given."""
    decoder = None
    left = limit
    while True:
        block = stream.read(BLOCK if left is None else min(BLOCK, left))
        if decoder is None:
            decoder = _decoder(block)
        text = decoder.decode(block, final=not block)
        # a U+FFFD that stands in the file was not put there by us
        broken = text.count("\ufffd") - block.count(b"\xef\xbf\xbd")
        if text:
            yield text, max(0, broken)
        if not block:
            return
        if left is not None:
            left -= len(block)


def _from_text(stream, kind, path, part):
    """A text file: one document, or the stretch of a long one that begins in start..end."""
    limit = None
    if part.end is not None:
        # from the first line that begins in the stretch to the first that begins behind it, so
        # that each line belongs to one part, whoever reads the others
        begin = _line_at(stream, part.start, part.end)
        after = _line_at(stream, part.end, None)
        if begin is None or after == begin:
            return
        stream.seek(begin)
        limit = after - begin
    title = ""
    held = ""
    broken = 0
    number = 0  # of stretches of 16 pieces, so that a file of any length is never held whole
    for block, (text, replaced) in enumerate(_texts(stream, limit)):
        held += text
        broken += replaced
        if block == 0 and part.start == 0:
            title, held = split_title(held, kind)
        while len(held) >= 17 * PIECE:
            at = _cut(held, 16 * PIECE)
            # the U+FFFD before the cut are those that were replaced, as far as these go
            here = min(broken, held.count("\ufffd", 0, at))
            yield Document(held[:at], title, str(path), f"{part.start}.{number}", here)
            held = held[at:]
            broken -= here
            number += 1
    yield Document(held, title, str(path), f"{part.start}.{number}", broken)


def _line_at(stream, at, end):
    """Where the first line begins at or after byte `at`; None if that is not before `end`.

    end None: anywhere, at the latest at the end of the file.
    """
    if at == 0:
        return 0
    stream.seek(at - 1)  # the byte before: if it ends a line, the next begins at `at`
    while True:
        block = stream.read(BLOCK)
        if not block:
            return None if end is not None else at
        found = block.find(b"\n")
        if found >= 0:
            begin = at + found
            return begin if end is None or begin < end else None
        at += len(block)
        if end is not None and at >= end:
            return None


def _records(stream, kind, path, part, counts):
    """Yields (place, object) of a .jsonl, .json or .csv file."""
    if kind == ".jsonl":
        yield from _lines(stream, part, counts)
        return
    if kind == ".csv":
        csv.field_size_limit(LONGEST)
        encoding = "utf-16" if stream.peek(2)[:2] in UTF16 else "utf-8-sig"
        rows = csv.DictReader(io.TextIOWrapper(stream, encoding, "replace", newline=""))
        try:
            for number, row in enumerate(rows, start=1):
                yield str(number), row
        except csv.Error as error:
            counts[f"{path}: a damaged table ({error}); what came before is read"] += 1
        return
    # .json: an object has no end before its last byte, so it is held whole
    data = stream.read(LONGEST + 1)
    check(len(data) <= LONGEST, f"{path}: longer than 64 MB: give it as .jsonl, a line a document")
    try:
        content = json.loads(_decoder(data).decode(data, final=True))
    except (ValueError, RecursionError):
        counts[f"{path} is no JSON"] += 1
        return
    if isinstance(content, dict) and content:
        if all(isinstance(value, dict) for value in content.values()):
            content = list(content.values())  # {name: record}
    if not isinstance(content, list):
        content = [content]
    for number, record in enumerate(content):
        yield str(number), record


def _lines(stream, part, counts):
    """Yields (place, object) of the lines of a .jsonl file that begin in the part."""
    at = 0
    if part.end is not None:
        at = _line_at(stream, part.start, part.end)
        if at is None:
            return
        stream.seek(at)
    while part.end is None or at < part.end:
        line = stream.readline(LONGEST)
        if not line:
            return
        where = f"@{at}"
        at += len(line)
        if len(line) == LONGEST and not line.endswith(b"\n"):  # skip the rest of it, unread
            counts["lines longer than 64 MB"] += 1
            while line and not line.endswith(b"\n"):
                line = stream.readline(BLOCK)
                at += len(line)
            continue
        if not line.strip():
            continue
        try:
            yield where, json.loads(line.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError):
            counts["lines that are no JSON"] += 1


def _from_records(records, field, title_field, path, counts):
    """Documents out of objects, rows and bare texts."""
    for where, record in records:
        title = ""
        text = record
        if isinstance(record, dict):
            text = record.get(field)
            title = record.get(title_field)
            if text is None:
                keys = ", ".join(str(key) for key in list(record)[:8])
                counts[f"records without the field {field!r}; there are: {keys}"] += 1
                continue
        if not isinstance(text, str):
            counts[f"records whose field {field!r} is no text"] += 1
            continue
        if not isinstance(title, str):
            title = ""
        yield Document(text, title, str(path), where, text.count("\ufffd"))


# -- Text out of markup -----------------------------------------------------------------------

# what stands in lines of its own, and what is no text
BLOCKS = set(
    "address article aside blockquote br dd div dl dt fieldset figcaption figure footer".split()
)
BLOCKS |= set("form h1 h2 h3 h4 h5 h6 header hr li main nav ol p pre section table tr ul".split())
NO_TEXT = {"script", "style", "template", "noscript", "svg", "iframe"}


class TextOfHtml(html.parser.HTMLParser):
    """Collects the text of a page and its <title>."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.text = []
        self.title = ""
        self.in_title = False
        self.in_pre = 0  # how many <pre> are open: line ends and spaces count there
        self.hidden = []  # the elements of NO_TEXT that are open
        self.behind = []  # text in them: it is text after all, if they are never closed

    def handle_starttag(self, tag, attributes):
        if tag == "title" and not self.hidden:  # a picture (svg) may have one, too
            self.in_title = True
        if tag == "pre":
            self.in_pre += 1
        if tag == "body":  # whatever was left open before
            self._show()
        if tag in NO_TEXT:
            self.hidden.append(tag)
        if tag in BLOCKS:
            self._add("\n")

    def handle_startendtag(self, tag, attributes):
        if tag not in NO_TEXT:  # <svg/> is closed already
            self.handle_starttag(tag, attributes)
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag == "title":
            self.in_title = False
        if tag == "pre":
            self.in_pre = max(0, self.in_pre - 1)
        if tag in self.hidden:
            while self.hidden.pop() != tag:  # those in it end with it
                pass
            if not self.hidden:
                self.behind.clear()
        if tag in BLOCKS:
            self._add("\n")

    def handle_data(self, data):
        if self.in_title:
            self.title += data
        elif self.in_pre:
            self._add(data)
        else:
            self._add(re.sub(r"\s+", " ", data))

    def _add(self, text):
        part = self.behind if self.hidden else self.text
        if part and part[-1].endswith("\n") and not self.in_pre:
            text = text.lstrip(" ")
        part.append(text)

    def _show(self):
        """Takes what stands in an element that is never closed for text, unless it is a program."""
        if not {"script", "style"} & set(self.hidden):
            self.text += self.behind
        self.behind.clear()
        self.hidden.clear()

    def close(self):
        super().close()
        self._show()


def _from_html(stream, path, counts):
    """A page: its text, a block a line."""
    data = stream.read(LONGEST + 1)
    if len(data) > LONGEST:
        counts[f"{path}: a page longer than 64 MB"] += 1
        return
    text = _decoder(data).decode(data, final=True)
    page = TextOfHtml()
    page.feed(text)
    page.close()
    body = re.sub(r" +\n", "\n", "".join(page.text))
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    yield Document(body, page.title, str(path), "", body.count("\ufffd"))


NO_TITLE = SPACED_ENDS + OTHER_ENDS + "．:;,，、：；"  # how no title ends


def split_title(text, kind):
    """(title, the text without it) of a text file; the title is "" where it has none.

    >>> split_title("# Kyiv\\n\\nA city.", ".md"), split_title("Kyiv\\n====\\nA city.", ".rst")
    (('Kyiv', 'A city.'), ('Kyiv', 'A city.'))
    >>> split_title("Kyiv\\n\\nA city.", ".txt"), split_title("A city.\\n\\nLarge.", ".txt")
    (('Kyiv', 'A city.'), ('', 'A city.\\n\\nLarge.'))
    """
    first, _, rest = text.strip().partition("\n")
    second, _, after = rest.partition("\n")
    first = first.strip()
    is_title = 0 < len(first) <= LONGEST_TITLE  # a longer line is text, and stays
    if kind == ".md" and is_title and re.match(r"#{1,6}\s", first):
        return first.strip("# "), rest.strip()
    marks = "=-" if kind == ".md" else r"=~*#^\-"  # in .md "***" is a rule across the page
    underlined = re.fullmatch(rf"([{marks}])\1{{2,}}", second.strip())
    if kind in (".md", ".rst") and is_title and underlined and first[-1] not in NO_TITLE:
        return first, after.strip()
    # of a plain text: a short first line that is no sentence, and then an empty one
    if 0 < len(first) <= 80 and rest and not second.strip() and first[-1] not in NO_TITLE:
        return first, rest.strip()
    return "", text


# -- Pieces and cleaning ----------------------------------------------------------------------

# Control characters but line end and tab are no text in any script. Half of a surrogate pair, which
# JSON can hold, is none either.
NO_CHARACTER = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])
NO_CHARACTER |= dict.fromkeys([11, 12, 0x85], "\n")  # another line, or page
NO_CHARACTER |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def clean(text):
    """Line ends as LF, no control characters, no blanks at the end of lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(NO_CHARACTER)
    return re.sub(r"[ \t]+\n", "\n", text).strip()


def _cut(text, most):
    """Where to cut a text, at most `most` characters in: after a paragraph, line or word."""
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, most // 2, most)
        if at >= 0:
            return at + len(mark)
    return most


def _pieces(document):
    """The document, cleaned; in several pieces if it is long."""
    text = clean(document.text)
    title = " ".join(clean(document.title).split())[:LONGEST_TITLE]
    left = document.broken  # characters replaced, of those that are U+FFFD
    number = 0
    while text or number == 0:
        at = len(text)
        if at > 2 * PIECE:
            at = _cut(text, PIECE)
        elif at > PIECE:  # in the middle: no short rest that a filter would drop
            at = _cut(text, (at + 1) // 2)
        place = f"{document.place}/{number}"
        broken = min(left, text[:at].count("\ufffd"))
        yield Document(text[:at].strip(), title, document.file, place, broken)
        text = text[at:]
        left -= broken
        number += 1
