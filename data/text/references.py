"""Documents -> references: texts of at most ref_len tokens (sec. 4.4)."""

import unicodedata

from corpus import fitting, sentences


def references_of(text, title, tokenizer, ref_len):
    """Token lists of at most ref_len tokens, which together are the text; ref_len >= 16. And how
    many tokens of each come before the text's own (see `n_before`).

    Sentences stay whole where they fit. The title stands in front of each reference ("Kyiv: ..."),
    since a reference is read alone: a kept token must know whose fact it is.
    """
    text = unicodedata.normalize("NFC", text)
    title = fitting(title, tokenizer, ref_len // 4)
    head = f"{title}: " if title else ""
    budget = ref_len - len(tokenizer.encode(head))
    references = []
    before = []
    held = ""  # sentences of the reference that is being made
    n_held = 0  # their tokens, counted one by one
    for sentence in sentences(text):
        n = len(tokenizer.encode(sentence))
        if n_held + n > budget:
            _finish(held, title, head, tokenizer, ref_len, references, before)
            held = ""
            n_held = 0
        held += sentence
        n_held += n
    _finish(held, title, head, tokenizer, ref_len, references, before)
    return references, before


def begins_with(text, title):
    """Whether a text begins with its title, as words of their own.

    >>> begins_with("Iran has oil.", "Iran"), begins_with("Iranian oil", "Iran")
    (True, False)
    >>> begins_with("北京是首都", "北京")  # without spaces words do stand side by side
    True
    """
    if not title or not text.startswith(title):
        return False
    behind = text[len(title) : len(title) + 1]
    joins_on = behind.isdigit() or behind.lower() != behind.upper()
    return not joins_on and not unicodedata.category(behind or " ").startswith("M")


def _finish(held, title, head, tokenizer, ref_len, references, before):
    """Adds the reference of some sentences; or several, if it is one sentence that is too long."""
    held = held.strip()
    while held:
        front = "" if begins_with(held, title) else head  # it need not be said twice
        piece = held
        ids = tokenizer.encode(front + held[: 16 * ref_len])
        if len(ids) > ref_len or len(held) > 16 * ref_len:
            piece = fitting(held, tokenizer, ref_len - len(tokenizer.encode(front)))
            ids = tokenizer.encode(front + piece)
        if ids:  # else the tokenizer has none of these characters
            references.append(ids[:ref_len])
            n = n_before(front, piece, tokenizer) if title else 0
            before.append(min(n, len(references[-1]) - 1))
        held = held[len(piece) :].strip()


def n_before(front, piece, tokenizer):
    """How many tokens of the reference front + piece its text has not where it stands in its
    document, at the beginning of a line: those of the title, and of a first word that is other
    tokens after a line end than after a space. For the filter of copies, eq. (3.3), they do not
    count."""
    at = piece.find(" ", 20)
    start = piece[:at] if at > 0 else piece  # a few words show it
    ids = tokenizer.encode(front + start)
    in_document = tokenizer.encode("\n" + start)
    same = 0
    while same < min(len(ids), len(in_document)) and ids[-1 - same] == in_document[-1 - same]:
        same += 1
    return len(ids) - same
