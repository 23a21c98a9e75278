"""Sound through ffmpeg's libraries (PyAV), for what libsndfile does not read or does not read whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...config.extras import missing_extra
from ..types import Unreadable

READERS = "aac,ac3,aiff,amr,asf,au,caf,eac3,flac,g722,gsm,matroska,mov,mp3,nistsphere,ogg,tta,w64,wav,wv"
"""ffmpeg's names of the containers that are tried: none that is a list of other files or addresses"""
EXACT = ("mov,", "matroska,", "asf", "tta", "wv")
"""beginnings of names of containers whose announced duration is not a guess"""
DAMAGED = 0.01
"""share of the packets that may not decode, such as tags at the end of a stream without a container"""


def missing() -> str:
    """One line where PyAV is not installed; empty where it is."""
    try:
        import av  # noqa: F401
    except ModuleNotFoundError as error:
        return missing_extra(error) or str(error)
    return ""


class Stream(NamedTuple):
    """What a container says of its sound."""

    rate: int
    """Hz"""
    channels: int
    format: str
    seconds: float | None
    """announced, where that is exact"""


def look(path: Path) -> Stream:
    """Raises Unreadable when ffmpeg finds no sound or is not there."""
    if lacking := missing():
        raise Unreadable(lacking)
    import av

    try:
        with _open(path) as container:
            stream, name = container.streams.audio[0], container.format.name
            exact = name.startswith(EXACT) and len(container.streams) == 1 and container.duration is not None
            codec = stream.codec_context
            return Stream(
                stream.sample_rate or 0,
                codec.layout.nb_channels,
                f"{name.split(',')[0].upper()} {codec.name.upper()}",
                container.duration / av.time_base if exact else None,
            )
    except (av.FFmpegError, ValueError) as error:
        raise Unreadable(_reason(error)) from error


def blocks(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """(Hz, [frames,channels] float32) until the end. Raises Unreadable."""
    import av

    packets, damaged, reason = 0, 0, ""
    try:
        with _open(path) as container:
            for packet in container.demux(container.streams.audio[0]):
                packets += 1
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    damaged, reason = damaged + 1, _reason(error)
                    continue
                for frame in frames:
                    yield frame.sample_rate, _floats(frame)
    except (av.FFmpegError, ValueError) as error:
        raise Unreadable(_reason(error)) from error
    if damaged > DAMAGED * packets:
        raise Unreadable(f"damaged: {damaged} of {packets} packets cannot be decoded: {reason}")


def _open(path: Path) -> Any:
    import av

    container = av.open(os.fspath(path), options={"format_whitelist": READERS, "protocol_whitelist": "file"})
    streams = container.streams.audio
    if not streams or streams[0].codec_context is None:
        container.close()
        raise Unreadable("holds sound of a codec that ffmpeg does not know" if streams else "holds no sound")
    return container


def _floats(frame: Any) -> np.ndarray:
    """[frames,channels] float32 of a decoded frame, integers as -1..1."""
    values = frame.to_ndarray()
    kind, channels = frame.format.name, frame.layout.nb_channels
    values = values.T if kind.endswith("p") else values.reshape(-1, channels)
    if kind.startswith("u8"):
        return (values.astype(np.float32) - 128) / 128
    if kind.startswith("s"):
        return values.astype(np.float32) / np.float32(2.0 ** (8 * values.itemsize - 1))
    return values.astype(np.float32)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
