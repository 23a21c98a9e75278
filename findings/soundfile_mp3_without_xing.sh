#!/usr/bin/env bash
# soundfile 0.14.0 (libsndfile): of an MP3 without a Xing header whose bit rate varies, `soundfile.read` may return less
# than a quarter of the sound, without an error.
#
# Without that header libsndfile takes the length from the bit rate of the beginning and the size of the file, and reads
# no further than that. Where the beginning needs more bits than the rest (speech after music or noise, before silence)
# the guess is short and the end is missing; where it needs fewer, `soundfile.info` announces more than there is and
# `read` returns what there is. With the header both numbers are right. Files of streaming recorders and of encoders
# that write to a pipe have none. ffmpeg's decoder (PyAV) returns all of it, either way.
#
# Seen (25 s at 44,100 Hz, average bit rate 128 kbit/s):
#   soundfile 0.14.0, av 18.1.0
#   noise first, Xing header: 1102500 samples, announced 1102511, soundfile 1102511, ffmpeg 1102511
#   noise first, no header: 1102500 samples, announced 249144, soundfile 249144, ffmpeg 1104768
#   noise last, Xing header: 1102500 samples, announced 1102511, soundfile 1102511, ffmpeg 1102511
#   noise last, no header: 1102500 samples, announced 1764265, soundfile 1104768, ffmpeg 1104768
#
# Exits with 1 when it no longer happens.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet soundfile==0.14.0 av==18.1.0 numpy
"$venv/bin/python" - <<'PYTHON'
import io

import av
import numpy as np
import soundfile

RATE = 44_100
print(f"soundfile {soundfile.__version__}, av {av.__version__}")


def mp3(wave, header):
    file = io.BytesIO()
    with av.open(file, "w", format="mp3", options={"write_xing": str(int(header)), "id3v2_version": "0"}) as out:
        stream = out.add_stream("libmp3lame", rate=RATE, options={"abr": "1"})
        stream.bit_rate, stream.layout = 128_000, "mono"
        frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
        frame.rate = RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            out.mux(packet)
    return file.getvalue()


noise, silence = 0.5 * np.random.default_rng(0).standard_normal(5 * RATE), np.zeros(20 * RATE)
shares = {}
for name, parts in (("noise first", (noise, silence)), ("noise last", (silence, noise))):
    wave = np.concatenate(parts)
    for header in (True, False):
        data = mp3(wave, header)
        announced, read = soundfile.info(io.BytesIO(data)).frames, len(soundfile.read(io.BytesIO(data))[0])
        with av.open(io.BytesIO(data)) as file:
            decoded = sum(frame.samples for frame in file.decode(audio=0))
        what = "Xing header" if header else "no header"
        print(f"{name}, {what}: {len(wave)} samples, announced {announced}, soundfile {read}, ffmpeg {decoded}")
        assert decoded >= len(wave)
        shares[name, header] = read / len(wave)
assert shares["noise first", True] >= 1 and shares["noise last", True] >= 1
assert shares["noise first", False] < 0.3, "it no longer happens"
PYTHON
