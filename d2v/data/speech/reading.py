"""One sound file: what it says about itself, how long it is, its waveform.

libsndfile reads what it reads right; what it does not know, and MP3 and FLAC that do not tell their length,
go through ffmpeg's libraries (PyAV). A length is taken from the header where that can be trusted, else all is
decoded block by block and counted. Nothing is allocated because a header says so.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile

from ...config.run import Channels
from ..types import Unreadable
from . import ffmpeg
from .containers import ANOTHER, Container, holds_another_flac, look_into

MIN_RATE, MAX_RATE = 4_000, 768_000
"""Hz; outside of these a file is not speech but a mistake"""
SHORTFALL = 0.01
"""share of the frames promised by a header that may be missing (MP3 headers estimate); filled with zeros"""
BLOCK = 1 << 26
"""values of all channels decoded at a time: after each soundfile seeks, which may change what follows"""
MOST_FRAMES = 1 << 13
"""frames that a byte can hold: more than Opus and FLAC make of silence"""
LOUDEST = 1e12
"""largest value of a float file: beyond it is no scale of sound, and squares overflow"""
OVERHANG = 0.1
"""seconds by which a piece may end after its recording: tables round"""
SEEKABLE = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
"""what libsndfile enters at any frame, with the values that decoding from the start gives; FLAC is PCM"""
UNKNOWN = -1
"""frames of a file that must be decoded to know them"""


@dataclass(frozen=True)
class Header:
    """What a file says about itself, or what was found by decoding it."""

    frames: int
    """at `rate`"""
    rate: int
    """Hz; where it changes within the file, the first"""
    channels: int
    format: str
    damage: str = ""
    """how the header contradicts the size of the file; empty: it does not"""
    decoder: Literal["soundfile", "ffmpeg"] = "soundfile"
    measured: bool = False
    """whether the length is not the header's, but comes from decoding"""
    seconds: float | None = None
    """duration announced by a container that is decoded to measure it"""
    container: Container = field(default=Container(), repr=False)
    start: int = 0
    """first frame, at `rate`, of a piece of a recording"""
    recording: Header | None = field(default=None, repr=False)
    """that this is a piece of"""

    def problem(self, channels: Channels = "mix") -> str:
        """Why the file cannot be used; empty when it can. channels: data.channels"""
        if not MIN_RATE <= self.rate <= MAX_RATE:
            limit = f"at least {MIN_RATE}" if self.rate < MIN_RATE else f"at most {MAX_RATE}"
            return f"has a sample rate of {self.rate} Hz, must be {limit} Hz"
        if channels == "refuse" and self.channels > 1:
            return f"has {self.channels} channels, data.channels is refuse"
        return self.damage

    def samples(self, rate: int) -> int:
        """Length after resampling to `rate`."""
        return -(-self.frames * rate // self.rate)


def read_header(path: Path) -> Header:
    """Header of a file; where that does not tell the length, it is decoded to count.

    Raises Unreadable when the file is missing, is not audio or cannot be decoded for its length.
    """
    header = _look(path)
    if header.frames != UNKNOWN or header.damage:
        return replace(header, frames=max(0, header.frames))
    frames, segment, first, last, channels = 0, 0, 0, 0, header.channels
    for rate, block in _blocks(path, header):
        first, last = first or rate, last or rate
        if rate != last:
            frames, segment, last = frames + _length(segment, last, first), 0, rate
        segment += len(block)
        channels = max(channels, block.shape[1])
    if not segment:
        raise Unreadable("holds no sound that can be decoded")
    frames += _length(segment, last, first)
    damage = ""
    if header.seconds is not None and frames / first < header.seconds * (1 - SHORTFALL) - 0.1:
        damage = f"truncated: {header.seconds:.2f} s announced, {frames / first:.2f} s there"
    return replace(header, frames=frames, rate=first, channels=channels, damage=damage)


def piece_of(recording: Header, start: float, end: float | None) -> Header:
    """A piece of a recording. start, end: seconds; None: until the recording's end, which `end` may exceed by
    `OVERHANG`. Raises Unreadable for what is no piece of it."""
    seconds = recording.frames / recording.rate
    end = seconds if end is None or seconds < end <= seconds + OVERHANG else end
    if not 0 <= start < end <= seconds:
        raise Unreadable(f"{start:g} to {end:g} s is no piece of a recording of {seconds:g} s")
    first, last = round(start * recording.rate), round(end * recording.rate)
    if first == last:
        raise Unreadable(f"{start:g} to {end:g} s is less than a frame at {recording.rate} Hz")
    return replace(recording, frames=last - first, start=first, recording=recording)


def read_wave(path: Path, expected: Header, rate: int, channels: Channels = "mix") -> np.ndarray:
    """[expected.samples(rate)] float32 at `rate`, of several channels their mean or the first.

    A piece of a recording has the frames that it has in the recording's waveform, and is resampled alone.
    Raises Unreadable with the reason.
    """
    if expected.recording is not None:
        return resample(_read_piece(path, expected, expected.recording, channels), expected.rate, rate)
    header = _look(path)
    if header.measured:  # of which the index knows what decoding will show
        header = replace(header, rate=expected.rate)
    if problem := header.problem(channels):
        raise Unreadable(problem)
    if not header.measured and (header.frames, header.rate) != (expected.frames, expected.rate):
        raise Unreadable(_disagrees(header.frames, header.rate, expected))
    if header.format.startswith("FLAC") and holds_another_flac(path):
        raise Unreadable(ANOTHER)
    segments: list[tuple[int, list[np.ndarray]]] = []
    got = 0
    for found, block in _blocks(path, header):
        if channels == "refuse" and block.shape[1] > 1:
            raise Unreadable(f"has {block.shape[1]} channels, data.channels is refuse")
        if not segments or segments[-1][0] != found:
            segments.append((found, []))
        segments[-1][1].append(_one_channel(block, channels))
        got += -(-len(block) * header.rate // found)
        if got > expected.frames + len(segments) * header.rate:
            raise Unreadable(f"is longer than {expected.frames} frames at {expected.rate} Hz, as indexed")
    waves = [resample(_joined(blocks), found, header.rate) for found, blocks in segments]
    wave = _joined(waves)
    if header.measured and (len(wave), segments[0][0] if segments else 0) != (expected.frames, expected.rate):
        raise Unreadable(_disagrees(len(wave), segments[0][0] if segments else 0, expected))
    if len(wave) < expected.frames * (1 - SHORTFALL):
        raise Unreadable(f"truncated: {expected.frames} frames announced, {len(wave)} there")
    _check_values(wave)
    if len(wave) < expected.frames:
        wave = np.pad(wave, (0, expected.frames - len(wave)))
    return resample(wave, header.rate, rate)


def _read_piece(path: Path, piece: Header, recording: Header, channels: Channels) -> np.ndarray:
    """[piece.frames] float32 at the recording's rate; all is decoded of what cannot be entered anywhere."""
    enters = recording.decoder == "soundfile" and recording.format.endswith(SEEKABLE)
    if not enters or recording.container.links:
        return read_wave(path, recording, recording.rate, channels)[piece.start : piece.start + piece.frames]
    header = _look(path)
    if problem := header.problem(channels):
        raise Unreadable(problem)
    if (header.frames, header.rate) != (recording.frames, recording.rate):
        raise Unreadable(_disagrees(header.frames, header.rate, recording))
    try:
        with soundfile.SoundFile(next(_pieces(path, recording.container))) as file:
            file.seek(piece.start)
            block = file.read(piece.frames, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise Unreadable(str(getattr(error, "error_string", error))) from error
    if len(block) < piece.frames:
        raise Unreadable(f"truncated: {piece.frames} frames from {piece.start} on wanted, {len(block)} there")
    wave = _one_channel(block, channels)
    _check_values(wave)
    return wave


def _one_channel(block: np.ndarray, channels: Channels) -> np.ndarray:
    """[frames,channels] as [frames]: the first, or the mean."""
    one = channels == "first" or block.shape[1] == 1
    return np.ascontiguousarray(block[:, 0]) if one else block.mean(axis=1)


def _check_values(wave: np.ndarray) -> None:
    loudest = float(np.maximum(wave.max(initial=0), -wave.min(initial=0)))
    if not math.isfinite(loudest):
        raise Unreadable("holds NaN or inf")
    if loudest > LOUDEST:
        raise Unreadable(f"holds values up to {loudest:.3g}, must be at most {LOUDEST:g}")


def resample(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """[ceil(len * target / rate)] float32, through a windowed-sinc polyphase filter."""
    if rate == target:
        return wave
    from scipy.signal import resample_poly

    common = math.gcd(rate, target)
    return resample_poly(wave, target // common, rate // common).astype(np.float32)


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def _length(frames: int, rate: int, target: int) -> int:
    return -(-frames * target // rate)


def _disagrees(frames: int, rate: int, expected: Header) -> str:
    return f"has {frames} frames at {rate} Hz, but the index says {expected.frames} at {expected.rate} Hz"


def _look(path: Path) -> Header:
    """The header alone, with UNKNOWN frames where it does not tell or is not to be trusted."""
    if not path.is_file():
        raise Unreadable("does not exist")
    container = look_into(path)
    if container.kind == "mp3" and container.problem:
        raise Unreadable(container.problem)
    if container.measured:
        return _of_ffmpeg(path, container)
    try:
        headers = [soundfile.info(piece) for piece in _pieces(path, container)]
    except soundfile.SoundFileError as error:
        if container.problem:
            raise Unreadable(container.problem) from error
        reason = str(getattr(error, "error_string", error))
        if lacking := ffmpeg.missing():
            raise Unreadable(f"{reason} Beyond libsndfile, {lacking}") from error
        try:
            return _of_ffmpeg(path, container)
        except Unreadable as second:
            raise Unreadable(str(second) if "not recognised" not in reason else reason) from error
    info = headers[0]
    if info.subtype.startswith("MPEG") and container.kind != "mp3":  # in WAV, or behind what is no frame
        return _of_ffmpeg(path, container)
    if info.frames >= 2**62:  # FLAC from a pipe
        return _of_ffmpeg(path, container)
    frames = sum(_length(one.frames, one.samplerate, info.samplerate) for one in headers)
    size, damage = path.stat().st_size, container.problem
    if frames > size * MOST_FRAMES:
        damage = damage or f"announces {frames} frames, more than {size} bytes can hold"
    return Header(
        frames,
        info.samplerate,
        max(one.channels for one in headers),
        f"{info.format} {info.subtype}",
        damage,
        container=container,
    )


def _of_ffmpeg(path: Path, container: Container) -> Header:
    found = ffmpeg.look(path)
    return Header(
        UNKNOWN,
        found.rate,
        found.channels,
        found.format,
        container.problem,
        decoder="ffmpeg",
        measured=True,
        seconds=found.seconds,
        container=container,
    )


def _pieces(path: Path, container: Container) -> Iterator[Path | bytes | io.BytesIO]:
    """The file, or each of its chained streams."""
    if not container.links:
        yield os.fsencode(path) if os.name == "posix" else path  # soundfile refuses names that are not UTF-8
        return
    ends = (*container.links[1:], None)
    with open(path, "rb") as file:
        for start, end in zip(container.links, ends, strict=True):
            file.seek(start)
            yield io.BytesIO(file.read(-1 if end is None else end - start))


def _blocks(path: Path, header: Header) -> Iterator[tuple[int, np.ndarray]]:
    """(Hz, [frames,channels] float32) until the end. Raises Unreadable."""
    if header.decoder == "ffmpeg":
        yield from ffmpeg.blocks(path)
        return
    try:
        for piece in _pieces(path, header.container):
            with soundfile.SoundFile(piece) as file:
                frames = max(1, BLOCK // file.channels)
                if file.seekable():
                    file.seek(0)  # as soundfile.read does: bits of MP3 depend on it
                while len(block := file.read(frames, dtype="float32", always_2d=True)):
                    yield file.samplerate, block
    except soundfile.SoundFileError as error:
        reason = str(getattr(error, "error_string", error))
        if "psf_fseek" in reason:  # soundfile seeks to where the sound should have ended
            reason = f"truncated: {header.frames} frames announced, fewer there"
        raise Unreadable(reason) from error
