"""Speech with what was said: where transcripts lie, and letters for CTC.

Known layouts: Librispeech (`*.trans.txt` of lines `ID TEXT` beside ID.flac), a text file beside every audio
file (`x.txt` beside `x.wav`), fairseq's manifests (`train.tsv` with `train.wrd` or `train.ltr`), and the
embedded "speech". In a folder, subfolders (manifests: files) called train* are for training and those called
dev*, valid*, val* or test* are held out, each under its name; without them a fifth of all is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...config.atomic import write_json
from ...config.run import Config
from ..embedded import speech
from ..lines import lines_of, not_utf8
from ..loader import Loader
from ..splits import divide, is_held_out, is_training
from ..types import DataError, Report
from .files import (
    FileUtterances,
    Header,
    Utterances,
    header_or_reason,
    in_threads,
    list_files,
    mixed_channels,
    read_manifest,
)
from .letters import SPECIALS, WORD, normalise, spell, to_letters
from .pipeline import find_usable
from .source import AudioSource, SpeechUtterances


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


def read_spoken(path: str, cfg: Config, rate: int) -> dict[str, Spoken]:
    """ "train" and one or more held-out parts, too short utterances left out; see the file's head.

    cfg: front end, shortest and longest utterance. Training leaves out what is longer than
    data.max_seconds, as a cut transcript would be wrong. Raises DataError.
    """
    found: dict[str, Spoken]
    if path == "speech":
        found = {part: _embedded(part, rate) for part in speech.SPLITS}
    else:
        found = _on_disk(Path(path), rate)
    for name, part in found.items():
        usable = find_usable(part.utterances, cfg, part.report)
        if name == "train":
            fits = part.utterances.lengths[usable] <= cfg.data.max_seconds * rate
            if not fits.all():
                part.report.skipped[f"longer than data.max_seconds ({cfg.data.max_seconds} s)"] = int(
                    (~fits).sum()
                )
            usable = usable[fits]
        part.report.stop_if_too_many()
        found[name] = part.select(usable)
        if not len(usable):
            raise DataError(f"data: {path}: no utterance of part {name} can be used: {part.report.skipped}")
    return found


def _embedded(split: speech.SplitName, rate: int) -> Spoken:
    numbers = np.array([i for i, u in enumerate(speech.utterances()) if u.split == split], dtype=np.int64)
    texts = [speech.utterances()[i].text for i in numbers.tolist()]
    return Spoken(SpeechUtterances(numbers, rate), texts, Report("speech", len(numbers)))


def _on_disk(root: Path, rate: int) -> dict[str, Spoken]:
    if not root.is_dir():
        raise DataError(f"labels missing: {root}: a folder of speech and transcripts is needed")
    manifests = sorted(file for file in root.glob("*.tsv") if file.with_suffix(".wrd").is_file()
                       or file.with_suffix(".ltr").is_file())  # fmt: skip
    named = {file.stem: file for file in manifests} or {
        folder.name: folder for folder in sorted(root.iterdir()) if folder.is_dir()
    }
    train = [place for name, place in named.items() if is_training(name)]
    held = {name: place for name, place in named.items() if is_held_out(name)}
    if train and held:
        parts = {name: _read_part([place], rate) for name, place in held.items()}
        return {"train": _read_part(train, rate), **parts}
    whole = _read_part([root], rate)
    return {part: whole.select(numbers) for part, numbers in divide([""] * len(whole.texts)).items()}


def _read_part(places: list[Path], rate: int) -> Spoken:
    """Utterances of folders or manifests that have a transcript; the others are counted."""
    names: list[str] = []
    headers: list[Header] = []
    texts: list[str] = []
    report = Report(", ".join(map(str, places)), 0)
    for place in places:
        if place.suffix == ".tsv":
            root, files, _ = read_manifest(place)
            said = dict(zip(files, _manifest_texts(place, len(files)), strict=True))
        else:
            root, files = list_files(place)
            said = _folder_texts(root, files)
        report.total += len(files)
        said = {file: text for file, text in said.items() if normalise(text)}
        without = [file for file in files if file not in said]
        if without:
            report.skipped["no transcript"] = report.skipped.get("no transcript", 0) + len(without)
        spoken = [file for file in files if file in said]
        found = in_threads(lambda name, root=root: header_or_reason(root / name), spoken)  # type: ignore[misc]
        report.notes += mixed_channels(header for header in found if isinstance(header, Header))
        for file, header in zip(spoken, found, strict=True):
            reason = header if isinstance(header, str) else header.problem()
            if reason:
                report.unreadable[str(root / file)] = reason
            elif isinstance(header, Header):
                names.append(str((root / file).resolve()))
                headers.append(header)
                texts.append(said[file])
    if not names:
        raise DataError(f"labels missing: {report.path}: no audio file has a transcript")
    return Spoken(FileUtterances(Path("/"), names, headers, rate), texts, report)


def _folder_texts(root: Path, files: list[str]) -> dict[str, str]:
    """Transcripts of files, from Librispeech's lists or text files beside them."""
    listed: dict[Path, str] = {}
    for table in sorted(root.rglob("*.trans.txt")):
        for line in _lines(table):
            name, _, text = line.partition(" ")
            listed[table.parent / name] = text
    said: dict[str, str] = {}
    for file in files:
        stem = (root / file).with_suffix("")
        if stem in listed:
            said[file] = listed[stem]
        elif (beside := stem.with_suffix(".txt")).is_file():
            said[file] = " ".join(_lines(beside))
    return said


def _manifest_texts(manifest: Path, count: int) -> list[str]:
    words, letters = manifest.with_suffix(".wrd"), manifest.with_suffix(".ltr")
    if words.is_file():
        texts = _lines(words)
    else:
        texts = [line.replace(" ", "").replace(WORD, " ").strip() for line in _lines(letters)]
    if len(texts) != count:
        name = words if words.is_file() else letters
        raise DataError(f"data: {name} has {len(texts)} lines, {manifest} names {count} files")
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
