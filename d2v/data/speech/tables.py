"""Tables that say which sounds a data set has, in which part, and what is said in each.

Read as they are published: Common Voice (`clips/` beside train.tsv, dev.tsv and test.tsv), Kaldi and ESPnet
(`wav.scp`, and maybe `text` and `segments`, in a folder for each part), and NeMo's manifests (a JSON object a
line, with audio_filepath, and maybe text, and offset and duration of a piece of a recording).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..lines import lines_of, not_utf8
from ..splits import kind_of
from ..types import DataError
from ..walk import walk

PEEK = 1 << 20
"""bytes of a first line that are looked at to know a table"""


@dataclass(frozen=True)
class Row:
    """A sound, or a piece of a recording."""

    file: str
    """relative to the data set's folder, or absolute"""
    text: str
    """its transcript; empty: none"""
    piece: tuple[float, float | None] | None = None
    """where it begins and ends in the file, in seconds; None: at the file's end"""


Rows = dict[str, Row]
"""name of an utterance, which is its file's, or begins with it -> the utterance"""


def read_tables(root: Path) -> dict[str, Rows]:
    """The rows of each table in a folder, by the table's name; empty without any.

    Of Common Voice the tables of parts, without them validated.tsv. DataError for damaged tables, for two
    transcripts of one sound in a table.
    """
    found: dict[str, Rows] = {}
    voices: dict[str, Path] = {}
    for name in walk(root, (".tsv", ".json", ".jsonl", ".scp"), ()).files:
        file, base = root / name, os.path.basename(name)
        if base == "wav.scp":
            found[os.path.dirname(name) or name] = _kaldi(root, file)
        elif base.endswith(".tsv") and {"path", "sentence"} <= set(_first_line(file).split("\t")):
            voices[name] = file
        elif base.endswith((".json", ".jsonl")) and _is_nemo(_first_line(file)):
            found[name] = _nemo(root, file)
    parts = [name for name in voices if kind_of(_stem(name))]
    for name in parts or [name for name in voices if _stem(name) == "validated"]:
        found[name] = _common_voice(root, voices[name])
    return found


def _stem(name: str) -> str:
    return os.path.basename(name).partition(".")[0]


def _first_line(file: Path) -> str:
    with file.open("rb") as opened:
        return opened.readline(PEEK).decode(errors="replace").removeprefix("\ufeff").rstrip("\r\n")


def _lines(file: Path) -> list[str]:
    try:
        return lines_of(file.read_bytes())
    except UnicodeDecodeError as error:
        raise DataError(f"data: {file}: {not_utf8(error)}") from None


def _named(root: Path, sound: Path) -> str:
    """A file as listings have it: relative to root where it lies below."""
    path = os.path.normpath(sound)
    return os.path.relpath(path, root) if Path(path).is_relative_to(root) else os.path.abspath(path)


def _rows(root: Path, file: Path, pairs: Iterable[tuple[Path, str]]) -> Rows:
    """Of whole files."""
    found: Rows = {}
    for sound, text in pairs:
        row = Row(_named(root, sound), text)
        if found.setdefault(row.file, row) != row:
            raise DataError(f"data: {file}: a second transcript of {row.file}")
    return found


def _common_voice(root: Path, file: Path) -> Rows:
    header, *lines = (line.split("\t") for line in _lines(file) if line)
    at, said = header.index("path"), header.index("sentence")
    clips = file.parent / "clips"
    folder = clips if clips.is_dir() else file.parent
    pairs = []
    for number, row in enumerate(lines, start=2):
        if len(row) <= max(at, said):
            raise DataError(
                f"data: {file}, line {number}: {len(row)} columns, {max(at, said) + 1} are needed"
            )
        sound = row[at] if os.path.splitext(row[at])[1] else f"{row[at]}.mp3"  # in the first releases
        pairs.append((folder / sound, row[said]))
    return _rows(root, file, pairs)


def _kaldi(root: Path, file: Path) -> Rows:
    sounds: dict[str, str] = {}
    for number, line in enumerate(_lines(file), start=1):
        name, sound = _split(line)
        if not sound:
            continue
        if sound.endswith("|"):
            raise DataError(
                f"data: {file}, line {number}: a command, which is not run: give the files it makes"
            )
        sounds[name] = sound
    said = file.parent / "text"
    texts = dict(_split(line) for line in _lines(said)) if said.is_file() else {}
    segments = file.parent / "segments"
    if not segments.is_file():
        found = ((_found(root, file, sound), texts.get(name, "")) for name, sound in sounds.items())
        return _rows(root, file, found)
    rows: Rows = {}
    places = {name: _named(root, _found(root, file, sound)) for name, sound in sounds.items()}
    for number, line in enumerate(_lines(segments), start=1):
        if not line.strip():
            continue
        try:
            name, recording, first, last = line.split()
            start, end = float(first), float(last)
            place = places[recording]
        except (ValueError, KeyError):
            raise DataError(
                f"data: {segments}, line {number}: must be utterance, recording of wav.scp, start and end in "
                f"seconds, got {line!r}"
            ) from None
        rows[f"{place}:{name}"] = Row(place, texts.get(name, ""), (start, None if end < 0 else end))
    return rows


def _split(line: str) -> tuple[str, str]:
    """The first word of a line, and the rest, with spaces or tabs between; empty where there is none."""
    name, text, *_ = (*line.strip().split(maxsplit=1), "", "")
    return name, text


def _found(root: Path, table: Path, sound: str) -> Path:
    """A file that a table names relative to itself, to the data set, or to a folder above it."""
    for folder in (table.parent, root, *root.resolve().parents[:2]):
        if (folder / sound).exists():
            return folder / sound
    return table.parent / sound


def _is_nemo(line: str) -> bool:
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(first.get("audio_filepath"), str)


def _nemo(root: Path, file: Path) -> Rows:
    rows: Rows = {}
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            sound, text, seconds = entry["audio_filepath"], entry.get("text") or "", entry.get("duration")
            start = None if entry.get("offset") is None else float(entry["offset"])
            end = None if start is None or seconds is None else start + float(seconds)
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            raise DataError(
                f"data: {file}, line {number}: not an object with audio_filepath, and numbers as offset and "
                "duration"
            ) from None
        if not isinstance(sound, str) or not isinstance(text, str):
            raise DataError(f"data: {file}, line {number}: audio_filepath and text must be strings")
        place = _named(root, _found(root, file, sound))
        piece = None if start is None else (start, end)
        name = place if piece is None else f"{place}:{start:g}-{'' if end is None else format(end, 'g')}"
        row = Row(place, text, piece)
        if rows.setdefault(name, row) != row:
            raise DataError(f"data: {file}, line {number}: a second transcript of {name}")
    return rows
