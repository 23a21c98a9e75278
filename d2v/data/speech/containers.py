"""What the bytes of a sound file say that its decoder does not pass on.

libsndfile opens a file that was cut off as a shorter one, reads the first of chained Ogg streams alone, and
guesses the length of an MP3 without a Xing header, beyond which it does not read.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from ..types import Unreadable

OPEN_ENDED = ((0x7F00_0000, 0x7F00_0100), (0x7FFF_0000, 0x8000_0100), (0xFFFF_0000, 0xFFFF_FFFF))
"""chunk sizes (sox's AIFF, sox's WAV, ffmpeg's) that writers to a pipe put when they do not know the size"""
MOST_CHUNKS = 10_000
"""of a WAV or AIFF file, and tags before an MP3, that are walked in search of the sound"""
MP3_SEARCHED = 1 << 16
"""bytes after the tags of a file in which the first frame of an MP3 must begin"""
MP3_SUFFIXES = (".mp3", ".mp2", ".mp1", ".mpga")
MP3_ESTIMATED = 0.01
"""share of the bytes that a Xing header announces that may be missing: some encoders estimate"""
MP3_TAIL = 1 << 16
"""bytes that may follow the sound of an MP3, its other tags, before its Xing header is not believed"""

ANOTHER = "holds another file behind its sound"


@dataclass(frozen=True)
class Container:
    """What a file's own bytes say."""

    problem: str = ""
    """why the file cannot be used, such as how its header contradicts its size; empty: it can"""
    kind: Literal["", "ogg", "mp3"] = ""
    measured: bool = False
    """whether its length can only be told by decoding it, which libsndfile does not do right"""
    links: tuple[int, ...] = ()
    """of an Ogg file of several streams, one after the other: the byte at which each begins"""


def look_into(path: Path) -> Container:
    """Raises Unreadable where the file cannot be opened."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if not (head := file.read(64)):
                raise Unreadable("is empty")
            if head[:4] == b"OggS":
                return _ogg(file)
            if head[:7] == b"NIST_1A":
                return Container(_sphere(head + file.read(1 << 16), size))
            if found := _sound_chunk(file, head, size):
                return _checked(file, head, *found, size)
            return _mp3(path, file, size)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error


def _checked(file: BinaryIO, head: bytes, announced: int, start: int, size: int) -> Container:
    """Whether the sound that a chunk announces is there, and alone."""
    there = max(0, size - start)
    if announced > there and not any(low <= announced <= high for low, high in OPEN_ENDED):
        return Container(_truncated(announced, there))
    file.seek(start + announced + announced % 2)
    behind = file.read(12)
    if behind[:4] == head[:4] and behind[8:] == head[8:12]:
        return Container(ANOTHER)
    if head[:4] == b"RIFF" and not announced and there:
        # a recorder that ended before it wrote the size, unless what follows is a chunk
        length = struct.unpack("<I", behind[4:8])[0] if len(behind) >= 8 else size
        return Container(measured=not (behind[:4].isalnum() and length <= there - 8))
    return Container()


def _truncated(announced: int, there: int) -> str:
    return f"truncated: {announced} bytes of sound announced, {there} there"


def _sound_chunk(file: BinaryIO, head: bytes, size: int) -> tuple[int, int] | None:
    """(bytes of sound announced, the byte it begins at) of WAV in all its forms, AIFF, CAF, AU; else None."""
    if head[:4] in (b".snd", b"dns.") and len(head) >= 12:
        start, announced = struct.unpack(">II" if head[:1] == b"." else "<II", head[4:12])
        return announced, start
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        order, wanted, at = (">" if head[3:4] == b"X" else "<") + "4sI", b"data", 12
    elif head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        order, wanted, at = ">4sI", b"SSND", 12
    elif head[:4] == b"caff":
        order, wanted, at = ">4sq", b"data", 8
    elif head[:4] == b"riff" and head[24:28] == b"wave":  # Sony Wave64: the sizes count their own 24 bytes
        order, wanted, at = "<4s12xq", b"data", 40
    else:
        return None
    long, first = 0, struct.calcsize(order)
    for _ in range(MOST_CHUNKS):
        file.seek(at)
        if len(chunk := file.read(first + 16)) < first:
            return None
        name, length = struct.unpack(order, chunk[:first])
        if first == 24:
            length -= first
        if name == b"ds64" and len(chunk) >= first + 16:
            long = struct.unpack("<Q", chunk[first + 8 : first + 16])[0]
        if name == wanted:
            if length < 0:  # CAF: to the end
                return 0, at + first
            return (long if long and length == 0xFFFF_FFFF else length), at + first
        if length < 0 or length > size:
            return None
        at += first + length
        at += -at % 8 if first == 24 else length % 2 if first == 8 else 0
    return None


def _sphere(text: bytes, size: int) -> str:
    """What is wrong with a file of NIST SPHERE."""
    fields = {}
    for line in text.split(b"end_head")[0].decode("latin-1").splitlines():
        name, _, value = line.partition(" ")
        fields[name] = value.partition(" ")[2]
    coding = fields.get("sample_coding", "pcm")
    if "," in coding:
        return f"is compressed ({coding}), which only NIST's tools read: unpack it with `sph2pipe -f wav`"
    try:
        start = int(text.splitlines()[1])
        samples = int(fields["sample_count"]) * int(fields.get("channel_count", 1))
        announced = samples * int(fields["sample_n_bytes"])
    except (IndexError, KeyError, ValueError):
        return ""
    return _truncated(announced, size - start) if announced > size - start else ""


def _ogg(file: BinaryIO) -> Container:
    """The streams of an Ogg file and whether its last page is whole: every page is looked at."""
    starts: list[int] = []
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, size, begun = 0, len(data), False
        while 0 <= at < size:
            if data[at : at + 4] != b"OggS":
                at = data.find(b"OggS", at)
                continue
            body = at + 27 + data[at + 26] if at + 27 <= size else size + 1
            end = body + sum(data[at + 27 : body])
            if end > size:
                return Container("truncated: the Ogg stream breaks off within a page", "ogg")
            begins = bool(data[at + 5] & 2)
            if begins and not begun:  # several that begin together are one stream beside another
                starts.append(at)
            begun, at = begins, end
    return Container(kind="ogg", links=tuple(starts) if len(starts) > 1 else ())


def holds_another_flac(path: Path) -> bool:
    """Whether a second FLAC file begins within one, of which libFLAC reads nothing. All of it is searched."""
    start = b"fLaC\0\0\0\x22"  # and the length of the block that comes first in every file
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(start, data.find(start) + 1) > 0


def _mp3(path: Path, file: BinaryIO, size: int) -> Container:
    """Whether a file is MP3, and whether its first frame (Xing's header) tells its length, and rightly."""
    at = 0
    for _ in range(MOST_CHUNKS):
        file.seek(at)
        tag = file.read(10)
        if tag[:3] != b"ID3" or len(tag) < 10:
            break
        at += 10 + sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        at += 10 if tag[5] & 0x10 else 0
    file.seek(at)
    data = file.read(MP3_SEARCHED)
    start = len(data) - len(data.lstrip(b"\0"))  # padding
    if len(data) < start + 4 or not _is_mp3_frame(data[start : start + 4]):
        return Container(measured=path.suffix.lower() in MP3_SUFFIXES)
    tags = (data.find(name, start, start + 44) for name in (b"Xing", b"Info"))
    place = max(tags)
    if place < 0 or len(data) < place + 16:
        return Container(kind="mp3", measured=True)
    flags, _, announced = struct.unpack(">III", data[place + 4 : place + 16])
    there = size - at - start
    if flags & 3 == 3 and there < announced * (1 - MP3_ESTIMATED):
        return Container(_truncated(announced, there), "mp3")
    file.seek(at + start + announced)
    behind = file.read(4)
    another = len(behind) == 4 and (behind[:3] == b"ID3" or _is_mp3_frame(behind))
    return Container(kind="mp3", measured=flags & 3 != 3 or another or there > announced + MP3_TAIL)


def _is_mp3_frame(head: bytes) -> bool:
    """Whether 4 bytes can be the head of a frame of MPEG audio, layer I to III."""
    sync = head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    return sync and version != 1 and layer != 0 and head[2] >> 4 not in (0, 15) and head[2] >> 2 & 3 != 3
