"""Lines of users' files end at LF or CRLF alone, wherever they are read."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from d2v.data.lines import lines_of, not_utf8
from d2v.data.speech.files import read_manifest
from d2v.data.speech.transcripts import Vocabulary, read_spoken
from d2v.data.types import DataError
from tests.d2v.tiny_runs import make_data, tiny

ODD = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh"
"""what `str.splitlines` cuts into eight"""


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\nb\r\nc\n\n", ["a", "b", "c", ""]),
        (b"a\r\r\nb", ["a\r", "b"]),
        (codecs.BOM_UTF8 + b"a\n", ["a"]),
        (f"{ODD}\nx\r\n".encode(), [ODD, "x"]),
    ],
)
def test_lines(data: bytes, lines: list[str]) -> None:
    assert lines_of(data) == lines


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-16", "UTF-16, not UTF-8: a byte order mark at byte 0"),
        ("utf-32", "UTF-32, not UTF-8: a byte order mark at byte 0"),
        ("latin-1", "not UTF-8: invalid continuation byte at byte 3"),
    ],
)
def test_other_encodings(encoding: str, said: str) -> None:
    with pytest.raises(UnicodeDecodeError) as error:
        lines_of("na\nïve\n".encode(encoding))
    assert not_utf8(error.value) == said


def test_transcripts_and_vocabularies_keep_odd_characters(tmp_path: Path) -> None:
    folder = Path(make_data("audio", tmp_path / "data"))
    for file in folder.glob("*.wav"):
        file.with_suffix(".txt").write_bytes(codecs.BOM_UTF8 + "one\u2028two\x0cthree\r\nfour\n".encode())
    texts = {text for part in read_spoken(str(folder), tiny("audio"), 16_000).values() for text in part.texts}
    assert texts == {"one\u2028two\x0cthree four"}
    next(folder.glob("*.txt")).write_bytes("naïve".encode("utf-16"))
    with pytest.raises(DataError, match=r"\.txt: UTF-16, not UTF-8: a byte order mark at byte 0"):
        read_spoken(str(folder), tiny("audio"), 16_000)
    (tmp_path / "dict.ltr.txt").write_bytes("| 9\n\x85 8\na 7\n".encode())
    assert Vocabulary.read(tmp_path / "dict.ltr.txt").letters[-3:] == ("|", "\x85", "a")


def test_names_in_manifests_keep_odd_characters(tmp_path: Path) -> None:
    folder = Path(make_data("audio", tmp_path / "data"))
    file = min(folder.glob("*.wav"))
    file = file.rename(folder / "a\u2028b.wav")
    (tmp_path / "train.tsv").write_bytes(codecs.BOM_UTF8 + f"{folder}\r\n{file.name}\t16000\r\n".encode())
    assert read_manifest(tmp_path / "train.tsv")[1] == ["a\u2028b.wav"]
