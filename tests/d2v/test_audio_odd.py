"""Sound files as encoders, recorders and the net leave them: read whole, or named with what is wrong."""

from __future__ import annotations

import io
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from d2v.data.open import check_data, open_data
from d2v.data.speech.files import SUFFIXES
from d2v.data.speech.reading import read_header, read_wave
from d2v.data.types import DataError, Unreadable
from tests.d2v.test_data_audio import config, tone, write

RATE = 16_000
needs_ffmpeg = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("av"), reason="needs PyAV, of the extra train"
)


def melody(seconds: int, rate: int = RATE, first: int = 0) -> np.ndarray:
    """A note a second, 300 Hz and each 100 Hz higher."""
    notes = [tone(1.0, rate, 300.0 + 100 * (first + i)) for i in range(seconds)]
    return np.concatenate(notes)


def notes(wave: np.ndarray) -> list[int]:
    """The number of the note that sounds in the middle of each second."""
    middles = [wave[start + 4_000 : start + 12_000] for start in range(0, len(wave) - RATE // 2, RATE)]
    return [round((np.abs(np.fft.rfft(part)).argmax() * RATE / len(part) - 300) / 100) for part in middles]


def heard(path: Path) -> list[int]:
    """The notes of a file that is usable."""
    header = read_header(path)
    assert not header.problem(), header.problem()
    wave = read_wave(path, header, RATE)
    assert wave.dtype == np.float32 and len(wave) == header.samples(RATE)
    return notes(wave)


def reason(path: Path) -> str:
    """Why a file cannot be used, by its header or by its sound."""
    try:
        header = read_header(path)
        if problem := header.problem():
            return problem
        read_wave(path, header, RATE)
    except Unreadable as error:
        return str(error)
    return ""


def encode(path: Path, codec: str, wave: np.ndarray, rate: int = RATE) -> Path:
    """A file by ffmpeg's encoder `codec`."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout, stream.bit_rate = "mono", 96_000
        resampler = av.AudioResampler(stream.codec_context.format or "s16", "mono", rate)
        frame = av.AudioFrame.from_ndarray(np.int16(wave * 32767)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        fifo = av.AudioFifo()
        for ready in resampler.resample(frame) + resampler.resample(None):
            fifo.write(ready)
        size = stream.codec_context.frame_size or 1024
        while piece := fifo.read(size) or fifo.read():
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return path


def mp3(path: Path, wave: np.ndarray, xing: bool = True) -> bytes:
    """A variable bit rate MP3 of libsndfile's, with or without the frame that tells its length."""
    data = write(path, wave, bitrate_mode="VARIABLE").read_bytes()
    assert b"Xing" in data[:64] or b"Info" in data[:64]
    return data if xing else data[data.index(data[:2], 64) :]


def riff(
    data: bytes, announced: int | None = None, tag: int = 1, rate: int = RATE, before: bytes = b""
) -> bytes:
    """A WAV file of one channel, of 16 bits where `tag` is PCM."""
    form = struct.pack("<HHIIHH", tag, 1, rate, 2 * RATE if tag == 1 else 4_000, 2 if tag == 1 else 1, 16)
    size = len(data) if announced is None else announced
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + before + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def pcm(wave: np.ndarray) -> bytes:
    return np.int16(wave * 32767).tobytes()


# sound as before


SOUND = [
    ("wav", {}),
    ("wav", {"subtype": "PCM_U8"}),
    ("wav", {"subtype": "PCM_24"}),
    ("wav", {"subtype": "DOUBLE"}),
    ("wav", {"subtype": "ULAW"}),
    ("wav", {"subtype": "IMA_ADPCM"}),
    ("w64", {}),
    ("rf64", {"format": "RF64"}),
    ("caf", {}),
    ("au", {}),
    ("aiff", {}),
    ("sph", {"format": "NIST"}),
    ("flac", {}),
    ("ogg", {}),
    ("opus", {"format": "OGG", "subtype": "OPUS"}),
    ("ogg", {"format": "OGG", "subtype": "OPUS"}),
    ("mp3", {}),
    ("wav", {"format": "FLAC"}),
    ("wav", {"format": "MP3"}),
    ("mp3", {"format": "WAV"}),
]


@pytest.mark.parametrize("channels", [1, 2], ids=["mono", "stereo"])
@pytest.mark.parametrize("suffix, how", SOUND, ids=[f"{s}-{'-'.join(h.values())}" for s, h in SOUND])
def test_sane_files_are_bit_for_bit_libsndfiles(
    suffix: str, how: dict[str, str], channels: int, tmp_path: Path
) -> None:
    many = how.get("format") not in ("FLAC", "MP3", "OGG", "NIST") and suffix not in (
        "mp3",
        "flac",
        "ogg",
        "opus",
    )
    if channels == 32 and (not many or "ADPCM" in how.get("subtype", "")):
        pytest.skip("a format of fewer channels")
    rng = np.random.default_rng(0)
    path = write(tmp_path / f"a.{suffix}", 0.1 * rng.standard_normal((RATE // 2, channels)), **how)
    header = read_header(path)
    assert (header.decoder, header.channels, header.rate) == ("soundfile", channels, RATE)
    expected = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    np.testing.assert_array_equal(read_wave(path, header, RATE), expected)


@pytest.mark.parametrize("samples", [0, 1])
def test_next_to_no_sound(samples: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", np.full(samples, 0.5))
    header = read_header(path)
    assert header.frames == samples and len(read_wave(path, header, 8_000)) == samples
    with pytest.raises(DataError, match=f"none of 1 utterances .* lasts {samples / RATE:g} s"):
        open_data(str(tmp_path), config())


def test_gsm_that_cannot_be_sought_in(tmp_path: Path) -> None:
    path = tmp_path / "a.gsm"
    soundfile.write(path, melody(3, 8_000), 8_000, format="RAW", subtype="GSM610")
    assert heard(path) == [0, 1, 2]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(riff(pcm(melody(2))))
    name = tmp_path / os.fsdecode(b"\xff\xe9.wav")
    (tmp_path / "a.wav").rename(name)
    assert heard(name) == [0, 1]


# what ffmpeg's libraries read


RATES = {"ac3": 32_000, "webm": 48_000, "mka": 48_000, "wma": 44_100}
CODECS = {
    "m4a": "aac", "aac": "aac", "webm": "libopus", "mka": "libopus", "wma": "wmav2", "ac3": "ac3",
    "tta": "tta", "wv": "wavpack", "g722": "g722", "mp2": "mp2", "3gp": "aac",
}  # fmt: skip


@needs_ffmpeg
@pytest.mark.parametrize("suffix", CODECS)
def test_formats_beyond_libsndfile(suffix: str, tmp_path: Path) -> None:
    rate = RATES.get(suffix, RATE)
    encode(tmp_path / f"a.{suffix}", CODECS[suffix], melody(3, rate), rate)
    assert f".{suffix}" in SUFFIXES
    pipeline = open_data(str(tmp_path), config(wave_norm="none"), purpose="eval")
    ((names, batch),) = pipeline.in_order(1)
    assert names == [f"a.{suffix}"] and notes(batch.source[0].numpy()) == [0, 1, 2]
    assert 0.3 < batch.source.std() < 0.4
    assert batch.source.shape[1] == pytest.approx(3 * RATE, abs=2_100)
    assert pipeline.report.notes == ["1 files do not tell their length and were decoded to measure it"]


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["m4a", "webm", "mka", "wma", "tta"])
def test_half_a_file_is_named(suffix: str, tmp_path: Path) -> None:
    rate = RATES.get(suffix, RATE)
    path = encode(tmp_path / f"a.{suffix}", CODECS[suffix], melody(6, rate), rate)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert any(word in reason(path) for word in ("truncated", "damaged", "not recognised"))


# MP3


@needs_ffmpeg
def test_mp3_without_a_length_is_read_to_its_end(tmp_path: Path) -> None:
    noise = 0.5 * np.random.default_rng(0).standard_normal(2 * RATE).clip(-1, 1)
    data = mp3(tmp_path / "a.mp3", np.concatenate([noise, 0.1 * melody(8)]), xing=False)
    (tmp_path / "a.mp3").write_bytes(data)
    guessed = soundfile.info(tmp_path / "a.mp3").frames
    assert guessed < 0.8 * 10 * RATE, "libsndfile guesses by the first frames and reads no further"
    assert heard(tmp_path / "a.mp3")[2:] == list(range(8))


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["cover", "two", "inside wav", "junk", "middle", "wrong suffix"])
def test_mp3_of_every_kind_is_whole(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.wav" if "wav" in kind or "suffix" in kind else "a.mp3")
    bare, whole = mp3(tmp_path / "b.mp3", melody(4), xing=False), mp3(tmp_path / "b.mp3", melody(4))
    picture = b"ID3\3\0\0" + bytes([0, 2, 0, 0]) + b"APIC" + b"\xff\xfb\x90\0" * 8191
    path.write_bytes({
        "cover": picture[: 10 + (2 << 14)] + bare,
        "two": whole + whole,
        "inside wav": riff(bare, tag=0x55),
        "junk": b"\0\x10" * 300 + bare,
        "middle": bare[bare.index(bare[:2], len(bare) // 4) + 100 :],
        "wrong suffix": bare,
    }[kind])  # fmt: skip
    found = heard(path)
    assert found == {"two": [0, 1, 2, 3] * 2, "middle": found[:-2] + [2, 3]}.get(kind, [0, 1, 2, 3])
    if kind == "middle":
        assert len(found) >= 2


# chained streams


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("kind", ["same", "rate", "channels", "three"])
def test_chained_ogg_is_read_to_its_end(subtype: str, kind: str, tmp_path: Path) -> None:
    def link(first: int, rate: int = RATE, channels: int = 1) -> bytes:
        wave = np.stack([melody(2, rate, first)] * channels, axis=1)
        return write(tmp_path / "b.ogg", wave, rate, format="OGG", subtype=subtype).read_bytes()

    one = link(0)
    path = tmp_path / "a.ogg"
    if kind == "same":  # serial numbers too
        path.write_bytes(one + one)
    elif kind == "three":
        path.write_bytes(one + link(2) + link(4))
    else:
        path.write_bytes(one + link(2, 24_000 if kind == "rate" else RATE, 1 if kind == "rate" else 2))
    assert soundfile.info(path).frames == 2 * RATE
    assert heard(path) == {"same": [0, 1, 0, 1], "three": list(range(6))}.get(kind, [0, 1, 2, 3])
    header = read_header(path)
    assert header.channels == (2 if kind == "channels" else 1)
    path.write_bytes(path.read_bytes()[:-100])
    assert reason(path) == "truncated: the Ogg stream breaks off within a page"


# FLAC


def flac(path: Path, total: int | None = None, rate: int | None = None) -> Path:
    """A file whose header says something else than is there: total samples, or a sample rate."""
    data = bytearray(write(path, melody(3)).read_bytes())
    fields = int.from_bytes(data[18:26], "big")
    if total is not None:
        fields = fields >> 36 << 36 | total
    if rate is not None:
        fields = fields & ~(0xFFFFF << 44) | rate << 44
    data[18:26] = fields.to_bytes(8, "big")
    path.write_bytes(data)
    return path


@needs_ffmpeg
def test_flac_of_unknown_length(tmp_path: Path) -> None:
    path = flac(tmp_path / "a.flac", total=0)
    header = read_header(path)
    assert header.frames == 3 * RATE and header.measured
    whole = write(tmp_path / "b.flac", melody(3))
    np.testing.assert_array_equal(read_wave(path, header, RATE), read_wave(whole, read_header(whole), RATE))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged" in reason(path)


@pytest.mark.parametrize(
    "lie, message",
    [
        ({"total": 2**36 - 1}, "announces 68719476735 frames, more than"),
        ({"total": 2**27}, "truncated: 134217728 frames announced, fewer there"),
        ({"rate": 2**20 - 1}, "has a sample rate of 1048575 Hz, must be at most 768000 Hz"),
        ({"rate": 1_000}, "has a sample rate of 1000 Hz, must be at least 4000 Hz"),
    ],
    ids=["2^36", "2^27", "fast", "slow"],
)
def test_flac_that_lies(lie: dict[str, int], message: str, tmp_path: Path) -> None:
    assert message in reason(flac(tmp_path / "a.flac", **lie))


# sizes in headers


@pytest.mark.parametrize("announced", [0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_F000, 0x8000_0000])
def test_wav_from_a_pipe(announced: int, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(riff(pcm(melody(3)), announced))
    assert heard(tmp_path / "a.wav") == [0, 1, 2]


@pytest.mark.parametrize("announced", [0x7F00_0008, 0x7FFF_FFFF])
def test_aiff_from_a_pipe(announced: int, tmp_path: Path) -> None:
    data = write(tmp_path / "a.aiff", melody(3)).read_bytes()
    at = data.index(b"SSND") + 4
    (tmp_path / "a.aiff").write_bytes(data[:at] + struct.pack(">I", announced) + data[at + 4 :])
    assert heard(tmp_path / "a.aiff") == [0, 1, 2]


@needs_ffmpeg
def test_wav_of_a_recorder_that_never_wrote_the_size(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(riff(pcm(melody(3)), 0))
    assert heard(tmp_path / "a.wav") == [0, 1, 2]
    (tmp_path / "a.wav").write_bytes(riff(b"LIST" + struct.pack("<I", 4) + b"INFO", 0))
    assert read_header(tmp_path / "a.wav").frames == 0, "a chunk is no sound"


HALF = ["wav", "info", "rf64", "w64", "caf", "au", "aiff", "sph"]


@pytest.mark.parametrize("suffix", HALF)
def test_half_of_every_container_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "info":  # libsndfile's log is full before it comes to the size
        entries = b"INFO" + b"".join(b"ICMT" + struct.pack("<I", 100) + b"x" * 100 for _ in range(200))
        path = tmp_path / "a.wav"
        path.write_bytes(riff(pcm(melody(3)), before=b"LIST" + struct.pack("<I", len(entries)) + entries))
    else:
        write(path, melody(3), format={"sph": "NIST"}.get(suffix, suffix.upper()), subtype="PCM_16")
    assert heard(path) == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:-40_000])
    announced = {"caf": 96_004, "aiff": 96_008}.get(suffix, 96_000)
    assert reason(path).startswith(f"truncated: {announced} bytes of sound announced, 5")


def flac_of(wave: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="FLAC")
    return file.getvalue()


BAD: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "rate of 2^31": ("a.wav", lambda: riff(pcm(melody(1)), rate=2**31 - 1), "sample rate of 2147483647 Hz"),
    "two files": ("a.wav", lambda: riff(pcm(melody(1))) * 2, "holds another file behind its sound"),
    "two flacs": ("a.flac", lambda: flac_of(melody(1)) * 2, "holds another file behind its sound"),
    "text": ("a.wav", lambda: b"no sound at all\n" * 99, "Format not recognised"),
    "a page": ("a.mp3", lambda: b"<!DOCTYPE html>\n" * 99, "Invalid data found"),
    "a list of files": ("a.m4a", lambda: b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "Format not recognised"),
    "a broken page": ("a.ogg", lambda: b"OggS", "breaks off within a page"),
    "empty": ("a.m4a", lambda: b"", "is empty"),
}


@needs_ffmpeg
@pytest.mark.parametrize("name, make, message", BAD.values(), ids=BAD)
def test_what_is_no_sound_is_named(
    name: str, make: Callable[[], bytes], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(make())
    assert message in reason(tmp_path / name)


def test_shorten_names_the_tool_that_unpacks_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.sph", melody(1), format="NIST")
    told, coded = b"sample_coding -s3 pcm", b"sample_coding -s26 pcm,embedded-shorten-v2.00"
    data = path.read_bytes()
    (tmp_path / "a.sph").unlink()
    (tmp_path / "a.wv1").write_bytes(data.replace(told, coded)[:1024] + bytes(5_000))
    report = check_data(str(tmp_path), config())
    assert "unpack it with `sph2pipe -f wav`" in report.unreadable["a.wv1"]


@pytest.mark.parametrize(
    "value, message",
    [
        (np.nan, "holds NaN or inf"),
        (-np.inf, "holds NaN or inf"),
        (1e300, "holds NaN or inf"),
        (1e30, "must be at most"),
    ],
)
def test_no_number_that_no_sound_has(value: float, message: str, tmp_path: Path) -> None:
    wave = np.stack([melody(1)] * 2, axis=1)
    wave[7, 1] = value
    assert message in reason(write(tmp_path / "a.wav", wave, subtype="DOUBLE"))


def test_a_file_that_grew_since_it_was_indexed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", melody(2))
    old = read_header(write(tmp_path / "b.wav", melody(1)))
    with pytest.raises(Unreadable, match="has 32000 frames at 16000 Hz, but the index says 16000 at 16000"):
        read_wave(path, old, RATE)


def test_a_library_that_is_missing_is_named_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.m4a").write_bytes(bytes(999))
    (tmp_path / "a.mp3").write_bytes(mp3(tmp_path / "b.mp3", melody(1), xing=False))
    report = check_data(str(tmp_path), config())
    install = 'd2v needs av, which is not installed: pip install "d2vkern[train]"'
    assert report.unreadable == {
        "a.m4a": f"Format not recognised. Beyond libsndfile, {install}",
        "a.mp3": install,
    }


# several channels


@pytest.mark.parametrize("manifest", [False, True], ids=["folder", "manifest"])
def test_what_becomes_of_several_channels(manifest: bool, tmp_path: Path) -> None:
    left, right = melody(2), 0.5 * melody(2, first=2)
    write(tmp_path / "a.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    write(tmp_path / "b.wav", right, subtype="FLOAT")
    (tmp_path / "m.tsv").write_text(".\na.wav\t32000\nb.wav\t32000\n")
    path = str(tmp_path / "m.tsv" if manifest else tmp_path)
    expected = {"mix": (left + right) / 2, "first": left}
    said = {"mix": "averaged", "first": "read by the first alone"}
    for channels, wave in expected.items():
        pipeline = open_data(path, config(batch=2, wave_norm="none", channels=channels), purpose="eval")
        _, batch = next(iter(pipeline.in_order(1)))
        np.testing.assert_allclose(batch.source[0].numpy(), wave, atol=1e-6)
        if not manifest:  # which does not say how many there are
            note = f"1 files have several channels, which are {said[channels]} (data.channels)"
            assert pipeline.report.notes == [note]
    report = check_data(path, config(channels="refuse"))
    assert report.unreadable == {"a.wav": "has 2 channels, data.channels is refuse"}
    with pytest.raises(ValueError, match="data.channels must be one of mix, first, refuse, got 'left'"):
        config(channels="left")
