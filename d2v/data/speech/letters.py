"""Texts as the letters of a CTC vocabulary.

A folder for transformers holds a copy of this file, for its tokenizer to do the same; so it needs the
standard library alone.
"""

from __future__ import annotations

from collections.abc import Container

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""fairseq's first entries of a dictionary; <s> is CTC's blank"""
WORD = "|"
"""ends a word, in fairseq's dictionaries"""


def clean(text: str) -> str:
    """Only letters, digits and apostrophes; other marks are spaces."""
    kept = (c if c.isalnum() or c == "'" else " " for c in text.replace("\u2019", "'"))
    return " ".join("".join(kept).split())


def normalise(text: str) -> str:
    """`clean` text in upper case, which vocabularies are counted on."""
    return clean(text.upper())


def spell(text: str, letters: Container[str]) -> str:
    """`clean` text in the case of a vocabulary: each letter as it is, else in upper, else in lower case.

    A letter that the vocabulary lacks in every form is in upper case.
    """
    known: dict[str, str] = {}
    for letter in (text := clean(text)):
        if letter not in known:
            forms = (letter, letter.upper(), letter.lower())
            known[letter] = next((form for form in forms if all(c in letters for c in form)), forms[1])
    return "".join(known[letter] for letter in text)


def to_letters(text: str) -> list[str]:
    """The letters of a clean text, a bar after every word (fairseq's libri_labels.py)."""
    return list("".join(f"{word}{WORD}" for word in text.split()))
