"""Speech with what was said: where transcripts lie, and letters for CTC.

Known layouts: fairseq's manifests (`train.tsv` with `train.wrd` or `train.ltr`), tables (see `tables`), else
of each file Librispeech's lists (`*.trans.txt` of lines `ID TEXT` beside ID.flac), Hugging Face's
audiofolder (`metadata.csv` or `.jsonl`) or a text beside it (`x.txt`, `x.lab` or `x.trn` beside `x.wav`);
and the embedded "speech". In a folder, subfolders (manifests and tables: files) called train* are for
training and those called dev*, valid*, val* or test* are held out, each under its name; without them a fifth
of all is.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...config.atomic import write_json
from ...config.fronts import LogMelFront, WaveformFront
from ...config.run import Channels, Config, DataConfig
from ..arrow import SUFFIXES as ROWS
from ..embedded import speech
from ..lines import lines_of, not_utf8
from ..loader import Loader
from ..splits import divide, labelled, to_divide, to_score
from ..types import EXAMPLES, DataError, Report
from ..walk import suffix_of, walk
from .files import Listing, Utterances, is_manifest, list_audio, of_manifests, read_manifest
from .letters import SPECIALS, WORD, normalise, spell, to_letters
from .pipeline import find_usable, read_index
from .source import AudioSource, SpeechUtterances
from .tables import read_tables
from .tars import BESIDE

PHONES = ".phn"
"""suffix of what lies beside TIMIT's sounds too"""
_SAMPLES = re.compile(r"^0 \d+ ")
"""what begins a transcript of TIMIT: its first and last sample"""
_IDENTIFIER = re.compile(r"\s*\([\w./-]+\)\s*$")
"""what ends a line of .trn: the name of the utterance"""


@dataclass(frozen=True)
class Vocabulary:
    """Letters and their numbers; 0 is blank."""

    letters: tuple[str, ...]
    """specials first"""

    @classmethod
    def of(cls, texts: Sequence[str]) -> Vocabulary:
        """The letters of some texts, most frequent first, as fairseq's dictionaries are sorted."""
        counts = Counter(letter for text in texts for letter in to_letters(normalise(text)))
        ranked = sorted(counts, key=lambda letter: (-counts[letter], letter))
        return cls((*SPECIALS, *ranked))

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """From `vocabulary.json`, or a fairseq dictionary (lines `LETTER COUNT`). Raises DataError."""
        try:
            if path.suffix == ".json":
                letters = tuple(json.loads(path.read_text(encoding="utf-8")))
            else:
                entries = lines_of(path.read_bytes())
                letters = (*SPECIALS, *(line.rsplit(" ", 1)[0] for line in entries if line))
        except (OSError, ValueError) as error:
            raise DataError(f"data: {path}: not a vocabulary: {error}") from None
        if letters[: len(SPECIALS)] != SPECIALS or len(set(letters)) != len(letters):
            raise DataError(
                f"data: {path}: a vocabulary begins with {', '.join(SPECIALS)} and repeats nothing"
            )
        return cls(letters)

    def write(self, path: Path) -> None:
        write_json(path, self.letters, ensure_ascii=False)

    def encode(self, text: str) -> np.ndarray:
        """[n] int64; a letter that is in it in neither case is <unk>."""
        number = {letter: i for i, letter in enumerate(self.letters)}
        unknown = number["<unk>"]
        return np.array([number.get(c, unknown) for c in to_letters(self.spell(text))], dtype=np.int64)

    def spell(self, text: str) -> str:
        """The text as `decode` would write it."""
        return spell(text, set(self.letters))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of letters without blanks and repeats."""
        letters = (self.letters[i] for i in ids if i >= len(SPECIALS))
        return " ".join("".join(letters).replace(WORD, " ").split())


@dataclass
class Spoken:
    """Utterances of one part and what is said in each."""

    utterances: Utterances
    texts: list[str]
    report: Report

    def select(self, keep: np.ndarray) -> Spoken:
        return Spoken(self.utterances.select(keep), [self.texts[i] for i in keep], self.report)

    def too_long(self, front: WaveformFront | LogMelFront, given: Vocabulary | None) -> list[int]:
        """The numbers of those with more letters and repeats than frames."""
        found = []
        for i, (text, length) in enumerate(zip(self.texts, self.utterances.lengths.tolist(), strict=True)):
            letters = to_letters(normalise(text)) if given is None else given.encode(text).tolist()
            repeats = sum(a == b for a, b in itertools.pairwise(letters))
            if len(letters) + repeats > front.frames(length):
                found.append(i)
        return found

    def that_fits(self, path: str, front: WaveformFront | LogMelFront, given: Vocabulary | None) -> Spoken:
        """Those that CTC can align, the others named: it needs a frame for each letter and one more
        between equal ones, else its loss is infinite (and zero_infinity makes it 0).

        given: the vocabulary, else it is counted on the texts. Raises DataError for none.
        """
        long = set(self.too_long(front, given))
        fits = [i not in long for i in range(len(self.texts))]
        reason = "transcript is longer than its frames"
        self.report.skip(reason, [self.utterances.names[i] for i in sorted(long)])
        if not any(fits):
            raise DataError(f"data: {path}: no utterance can be trained on: {'; '.join(self.report.lines())}")
        return self if all(fits) else self.select(np.flatnonzero(fits))


def read_spoken(path: str, cfg: Config, rate: int, *, score: bool = False) -> dict[str, Spoken]:
    """ "train" and one or more held-out parts, too short utterances left out; see the file's head.

    cfg: front end, shortest and longest utterance. score: what is held out alone, or all where nothing is.
    Training leaves out what is longer than
    data.max_seconds, as a cut transcript would be wrong. Raises DataError.
    """
    found = read_parts(path, cfg, rate)
    if score:
        found = to_score(found)
    elif (whole := to_divide(found, path)) is not None:
        numbers = divide([""] * len(whole.texts))
        found = {part: whole.select(some) for part, some in numbers.items()}
    return {
        name: usable_part(name, part, path, cfg, rate, train=name == "train" and not score)
        for name, part in found.items()
    }


def check_transcripts(path: str, cfg: Config, report: Report) -> None:
    """Say in the report what fine-tuning would find: how many utterances have transcripts, and which of these
    are too long for the frames of the preset's front end."""
    front = cfg.model.front
    assert isinstance(front, WaveformFront | LogMelFront)
    try:
        parts = read_parts(path, cfg, front.sample_rate)
    except DataError as error:
        if not str(error).startswith("labels missing"):
            report.notes.append(f"transcripts cannot be read: {error}")
        return
    report.facts["transcripts"] = {name: len(part.texts) for name, part in parts.items()}
    for name, part in parts.items():
        if long := [part.utterances.names[i] for i in part.too_long(front, None)]:
            which = f"{', '.join(long[:EXAMPLES])}{' ...' if len(long) > EXAMPLES else ''}"
            report.notes.append(
                f"of {name} {len(long):,} transcripts are longer than their frames, which fine-tuning leaves "
                f"out: {which}"
            )


def usable_part(name: str, part: Spoken, path: str, cfg: Config, rate: int, train: bool) -> Spoken:
    """The utterances of a part that are long enough, to train on also short enough. DataError for none."""
    usable = find_usable(part.utterances, cfg, part.report)
    if train:
        fits = part.utterances.lengths[usable] <= cfg.data.max_seconds * rate
        part.report.skip(
            f"longer than data.max_seconds ({cfg.data.max_seconds} s)",
            [part.utterances.names[i] for i in usable[~fits]],
        )
        usable = usable[fits]
    part.report.stop_if_too_many()
    if not len(usable):
        reasons = "; ".join(part.report.lines())
        raise DataError(f"data: {path}: no utterance of part {name} can be used: {reasons}")
    return part.select(usable)


def read_parts(path: str, cfg: Config, rate: int) -> dict[str, Spoken]:
    """All utterances that have a transcript, of each part, or of one part `WHOLE`."""
    if path == "speech":
        return {part: _embedded(part, rate) for part in speech.SPLITS}
    if not Path(path).is_dir() and suffix_of(path) not in (*ROWS, ".tar"):
        raise DataError(f"labels missing: {path}: a folder of speech and transcripts is needed")
    report = Report.of(path, cfg.data)
    listing, said = _transcribed(Path(path), report, cfg.data)
    parts = {
        part: _part(
            listing.select(numbers),
            said,
            rate,
            cfg.data.channels,
            replace(report, unreadable={}, skipped={}, notes=[]),
        )
        for part, numbers in listing.parts.items()
    }
    if not any(len(part.texts) for part in parts.values()):
        raise DataError(f"labels missing: {path}: no audio file has a transcript")
    return labelled(parts, lambda part: "" if part.texts else "no file has a transcript", report)


def _embedded(split: speech.SplitName, rate: int) -> Spoken:
    numbers = np.array([i for i, u in enumerate(speech.utterances()) if u.split == split], dtype=np.int64)
    texts = [speech.utterances()[i].text for i in numbers.tolist()]
    return Spoken(SpeechUtterances(numbers, rate), texts, Report("speech", len(numbers)))


def _transcribed(root: Path, report: Report, data: DataConfig) -> tuple[Listing, dict[str, str]]:
    """The audio files of a folder, and what is said in those that have a transcript."""
    manifests = [root / name for name in walk(root, (".tsv",)).files]
    manifests = [file for file in manifests if is_manifest(file) and _texts_of(file) is not None]
    if manifests:
        said: dict[str, str] = {}
        for manifest in manifests:
            folder, files, _ = read_manifest(manifest)
            texts = _manifest_texts(manifest, len(files))
            said |= {str((folder / file).absolute()): text for file, text in zip(files, texts, strict=True)}
        return of_manifests(root, manifests), said
    listing = list_audio(root, report, data, "texts")
    if listing.rows is not None:
        return listing, listing.rows.texts()
    if tables := read_tables(root):
        return listing, {name: row.text for rows in tables.values() for name, row in rows.items()}
    return listing, _folder_texts(listing.root, listing.names, listing.described or {})


def _part(listing: Listing, said: dict[str, str], rate: int, channels: Channels, report: Report) -> Spoken:
    """Utterances that have a transcript; the others are counted."""
    said = {file: said[file] for file in listing.names if normalise(said.get(file, ""))}
    without = [file for file in listing.names if file not in said]
    report.total = len(without)
    report.skip("no transcript", without)
    keep = [i for i, file in enumerate(listing.names) if file in said]
    utterances = read_index(listing.select(np.array(keep, np.int64)), rate, channels, report)
    return Spoken(utterances, [said[name] for name in utterances.names], report)


def _folder_texts(root: Path, files: list[str], in_tables: Mapping[str, str]) -> dict[str, str]:
    """Transcripts of files, from Librispeech's lists, else tables, else text files beside them."""
    listed: dict[str, str] = {}
    for table in walk(root, (".txt",)).files:
        if table.endswith(".trans.txt"):
            for line in _lines(root / table):
                name, _, text = line.partition(" ")
                listed[os.path.join(os.path.dirname(table), name)] = text
    beside = {
        (os.path.splitext(name)[0], suffix_of(name)): name for name in walk(root, (*BESIDE, PHONES)).files
    }
    said: dict[str, str] = {}
    for file in files:
        stem = os.path.splitext(file)[0]
        if stem in listed:
            said[file] = listed[stem]
        elif file in in_tables:
            said[file] = in_tables[file]
        elif suffix := next((suffix for suffix in BESIDE if (stem, suffix) in beside), ""):
            words = " ".join(_lines(root / beside[stem, suffix]))
            if suffix == ".trn":
                words = _IDENTIFIER.sub("", words)
            said[file] = _SAMPLES.sub("", words) if (stem, PHONES) in beside else words
    return said


def _texts_of(manifest: Path) -> Path | None:
    """The file with the words, or letters, of a manifest's files."""
    beside = (manifest.with_suffix(suffix) for suffix in (".wrd", ".ltr"))
    return next((file for file in beside if file.is_file()), None)


def _manifest_texts(manifest: Path, count: int) -> list[str]:
    file = _texts_of(manifest)
    assert file is not None  # as the caller asked
    texts = _lines(file)
    if file.suffix == ".ltr":
        texts = [line.replace(" ", "").replace(WORD, " ").strip() for line in texts]
    if len(texts) != count:
        raise DataError(f"data: {file} has {len(texts)} lines, {manifest} names {count} files")
    return texts


def _lines(file: Path) -> list[str]:
    try:
        return lines_of(file.read_bytes())
    except UnicodeDecodeError as error:
        raise DataError(f"data: {file}: {not_utf8(error)}") from None


class SpokenPart:
    """A held-out part: whole utterances with their texts, in order, as the vocabulary spells them."""

    def __init__(self, spoken: Spoken, path: str, cfg: Config, vocabulary: Vocabulary) -> None:
        source = AudioSource(path, spoken.utterances, cfg)
        self.texts = [vocabulary.spell(text) for text in spoken.texts]
        self.loader = Loader(source, cfg.data, torch.device("cpu"), spoken.report)

    def __len__(self) -> int:
        return len(self.texts)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None, list[str]]]:
        """Waveforms [B,samples], padding or None, and what is said."""
        for _, batch in self.loader.in_order(size):
            yield batch.source, batch.padding_mask, [self.texts[i] for i in batch.ids.tolist()]
