"""Texts as the letters of a CTC vocabulary.

A folder for transformers holds a copy of this file, for its tokenizer to do the same; so it needs the
standard library alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Container

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""fairseq's first entries of a dictionary; <s> is CTC's blank"""
WORD = "|"
"""ends a word, in fairseq's dictionaries"""
JOINERS = "\u00ad\u200c\u200d\u2060\ufeff"
"""within words: soft hyphen, zero width non-joiner and joiner, word joiner, byte order mark"""


def composed(text: str) -> str:
    """Text in Unicode's form NFC, in which one letter is spelled in one way."""
    return unicodedata.normalize("NFC", text)


def clean(text: str) -> str:
    """`composed` letters with their combining marks, digits and apostrophes; other marks are spaces.

    Vowel signs, tones and points are combining marks in many scripts (Devanagari, Thai, Hebrew). Soft hyphens
    and joiners within a word are dropped.
    """
    kept: list[str] = []
    for c in composed(text.replace("\u2019", "'")):
        if c.isalnum() or c == "'":
            kept.append(c)
        elif unicodedata.category(c) in ("Mn", "Mc") and not _selects_a_variant(c):
            kept.append(c if kept and kept[-1] not in " '" else " ")
        elif c not in JOINERS:
            kept.append(" ")
    return " ".join("".join(kept).split())


def _selects_a_variant(c: str) -> bool:
    """Whether a mark chooses a glyph, as behind emoji, and is no part of the spelling."""
    return "\ufe00" <= c <= "\ufe0f" or "\U000e0100" <= c <= "\U000e01ef"


def normalise(text: str) -> str:
    """`clean` text in upper case, which vocabularies are counted on."""
    return clean(composed(text).upper())


def spell(text: str, letters: Container[str]) -> str:
    """`clean` text in the case of a vocabulary: each letter as it is, else in upper, else in lower case.

    For a vocabulary that has marks apart from their letters, so are they here. A letter that the vocabulary
    lacks in every form is in upper case.
    """
    known: dict[str, str] = {}
    for letter in (text := clean(text)):
        if letter not in known:
            forms = [letter, composed(letter.upper()), composed(letter.lower())]
            apart = [unicodedata.normalize("NFD", form) for form in forms]
            fitting = (form for form in forms + apart if all(c in letters for c in form))
            known[letter] = next(fitting, forms[1])
    return "".join(known[letter] for letter in text)


def to_letters(text: str) -> list[str]:
    """The letters of a clean text, a bar after every word (fairseq's libri_labels.py)."""
    return list("".join(f"{word}{WORD}" for word in text.split()))
