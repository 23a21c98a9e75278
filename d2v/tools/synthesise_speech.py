"""Makes the embedded `speech` set: run `python -m d2v.tools.synthesise_speech`.

Kept so that anyone can see what the shipped files are and make them again. It needs the `flite`
program (CMU Flite 2.x, X11-style licence, as are its voices) with the voices slt, rms, kal16 and
awb; the trainer itself only reads the result. Every utterance is a different sentence of a small
grammar, so the sentences of the test split and of the unseen voice never occur in training.

Written to `d2v/data/assets`: `speech_<voice>.ogg` (Opus, 16 kHz, the voice's utterances end to end) and
`speech_labels.npz`:

    phones [P] str        names of the phones, index = label
    voices [V] str        the last one is held out
    texts [U] str         the sentence of each utterance, in the order the grammar made them
    voice [U] uint8       index into voices
    test [U] bool         utterance of the test split
    samples [U] int32     length; an utterance starts where its voice's previous one ends
    segments [U] int16    phones in the utterance
    phone [S] uint8       all utterances' phones, one after the other
    end [S] int32         where each ends, in samples from the start of its utterance
"""

from __future__ import annotations

import random
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16_000
VOICES = ("slt", "rms", "kal16", "awb")
SECONDS = {"slt": 340.0, "rms": 340.0, "kal16": 340.0, "awb": 200.0}
TEST_EVERY = 7
"""every 7th utterance of a seen voice is a test utterance"""
COMPRESSION = 0.932
"""libsndfile asks Opus for 6 + 250 * (1 - this) kbit/s: 23 here, transparent at 16 kHz"""
ASSETS = Path(__file__).resolve().parents[1] / "data" / "assets"


def _words(text: str) -> list[str]:
    """A hyphen stands for a space inside a phrase."""
    return [word.replace("-", " ") for word in text.split()]


NAMES = _words(
    "Joyce Theo Martha George Zoe Yusuf Heather Roy Charlotte Hugh Ingrid Vivian Jack Beth Oscar Shirley "
    "Kenji Maya Walter Ruth Quentin Nathan Louise Edith Pablo Chloe Bridget Thomas Olive Gareth Raj Ursula"
)
PLACES = _words(
    "kitchen harbour village garage bathroom theatre quarry church beach orchard museum library railway "
    "youth-club farmyard chemist cellar bridge square stadium factory meadow school bakery castle volcano "
    "university workshop hospital jungle valley office warehouse temple lighthouse embassy"
)
THINGS = _words(
    "treasure oyster feather judge teacher measure cushion engine thumb brother window kettle pigeon "
    "zebra violin hammer yoghurt whistle butcher coin cabbage fountain mouth vision leopard thunder "
    "basket shoulder cheese pencil goose chair wool hook bishop shadow ladder razor onion mirror voyage "
    "casual-shoe toybox rocket garden-hose angel bandage carriage clothing doctor envelope flower guitar "
    "hospital-bed iron jewel king lemon mushroom needle owl parcel question rabbit singer tongue umbrella "
    "vehicle watch youngster earring ostrich cow sugar-bowl wrench yacht badge blouse computer diver "
    "elbow fossil ginger handle"
)
PLURALS = _words(
    "boys leaves pages cousins horses bottles fishes towels matches voices foxes thieves roses mountains "
    "bees shoes toys rings churches hats cheques days fridges gloves hours islands jars knives lamps months "
    "noises owls paths queues rules songs teeth uncles vans weeks years zones clouds brushes joints eyes"
)
ADJECTIVES = _words(
    "joyful thick usual beige azure strange foolish heavy yellow quiet smooth northern rough cheap loud "
    "young huge busy warm other wooden royal early shy Asian odd pure chilly juicy oily healthy "
    "purple vague wild hungry tiny narrow bright green sour empty ancient eager fair gentle hollow icy "
    "jolly keen lazy modern nervous open proud quick rusty soft tough unusual velvet white extra zany"
)
PAST = _words(
    "watched pushed measured enjoyed followed noticed caught pulled avoided gathered touched washed used "
    "found chose painted moved sharpened taught shook exchanged voiced bought thanked cooked sold "
    "dragged heard joined kissed lifted named opened poured raised searched threw unpacked visited wiped "
    "borrowed crushed dug examined fetched guarded hid judged looked-after mended pleased revealed"
)
BASE = _words(
    "watch push measure enjoy follow notice catch pull avoid gather touch wash use find choose paint move "
    "teach shake exchange buy thank cook drag hear join lift name open pour raise search throw visit wipe"
)
ADVERBS = _words(
    "usually quickly together slowly this-morning yesterday rarely without-a-sound with-pleasure "
    "once-again by-chance too-soon all-through-July on-Thursday in-good-weather at-noon for-an-hour "
    "without-any-measure every-other-week right-now around-the-corner in-the-south under-the-moon "
    "somewhere-else"
)
UNITS = _words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
TEMPLATES = (
    "{Name} {past} the {adj} {thing} in the {place}.",
    "{Number} {adj} {plural} and a {thing} {past} {name} {adverb}.",
    "Why did {name} {base} the {thing} near the {place}, {adverb}?",
    "{Adverb}, the {adj} {thing} {past} {number} {plural}.",
    "The {thing} of {name} is {adj}, but the {plural} are {adj}.",
    "Please {base} {number} {plural} for {name}, then {base} the {thing}.",
    "Should they {base} that {adj} {thing}, or {base} these {plural}?",
    "{Name} and {name} live at {number} {place} road, with {number} {plural}.",
    "If you {base} the {plural} {adverb}, I would {base} your {thing}.",
    "Neither the {thing} nor the {adj} {plural} {past} the {place}.",
    "Call {digit}, {digit}, {digit}, {digit}, and ask {name} about the {thing}.",
    "There is a {adj}, {adj} {thing} between the {place} and the {place}.",
    "Oh, {name} {past} us {adverb}; we {past} her {thing}.",
    "Bring a {thing}, a {thing}, and {number} {plural} to the {place}.",
)


def _number(rng: random.Random) -> str:
    small = rng.choice(UNITS)
    return rng.choice(
        (small, rng.choice(TENS), f"{rng.choice(TENS)} {rng.choice(UNITS[:9])}", f"{small} hundred")
    )


def _sentence(rng: random.Random) -> str:
    """One sentence: each slot of a template filled independently."""
    words = {"name": NAMES, "place": PLACES, "thing": THINGS, "plural": PLURALS, "adj": ADJECTIVES,
             "past": PAST, "base": BASE, "adverb": ADVERBS, "digit": UNITS[:9]}  # fmt: skip
    text = rng.choice(TEMPLATES)
    while "{" in text:
        slot = text[text.index("{") + 1 : text.index("}")]
        word = _number(rng) if slot.lower() == "number" else rng.choice(words[slot.lower()])
        text = text.replace("{" + slot + "}", word.capitalize() if slot[0].isupper() else word, 1)
    return text


def _speak(voice: str, text: str, folder: Path) -> tuple[np.ndarray, list[str], np.ndarray]:
    """`text` in `voice`: int16 waveform [samples], phone names, end of each phone in samples."""
    path = folder / "utterance.wav"
    command = ["flite", "-voice", voice, "-psdur", "-t", text, "-o", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names, ends = zip(*(item.rsplit(":", 1) for item in printed.split()), strict=True)
    wave, rate = soundfile.read(path, dtype="int16")
    if rate != SAMPLE_RATE or wave.ndim != 1:
        raise ValueError(
            f"flite: voice {voice} must be mono at {SAMPLE_RATE} Hz, got shape {wave.shape} at {rate} Hz"
        )
    # the printed end of the last pause may lie beyond the waveform (kal16: by 0.12 s)
    end = np.minimum(np.rint(np.array(ends, dtype=np.float64) * SAMPLE_RATE), len(wave)).astype(np.int32)
    end[-1] = len(wave)
    return wave, list(names), end


def _encode(path: Path, wave: np.ndarray) -> None:
    """Writes Opus and refuses a codec that moves the sound: the labels would no longer fit."""
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, format="OGG", subtype="OPUS",
                             compression_level=COMPRESSION) as out:  # fmt: skip
        for start in range(0, len(wave), SAMPLE_RATE):
            out.write(wave[start : start + SAMPLE_RATE])
    decoded, _ = soundfile.read(path, dtype="float64")
    if len(decoded) != len(wave):
        raise ValueError(f"{path}: decoded length must be {len(wave)}, got {len(decoded)}")
    middle, span, reach = len(wave) // 2, 10 * SAMPLE_RATE, 400
    piece = wave[middle : middle + span].astype(np.float64)
    lags = range(-reach, reach + 1)
    match = [float(piece @ decoded[middle + lag : middle + lag + span]) for lag in lags]
    if abs(lag := lags[int(np.argmax(match))]) > 16:
        raise ValueError(f"{path}: the codec must not delay the sound, got {lag} samples")


def main() -> None:
    """Writes the assets and prints what they hold."""
    rng = random.Random(20)
    ASSETS.mkdir(exist_ok=True)
    used: set[str] = set()
    columns: dict[str, list] = {
        k: [] for k in ("texts", "voice", "test", "samples", "segments", "phone", "end")
    }
    for index, voice in enumerate(VOICES):
        waves: list[np.ndarray] = []
        with tempfile.TemporaryDirectory() as folder:
            while sum(map(len, waves)) < SECONDS[voice] * SAMPLE_RATE:
                text = _sentence(rng)
                if text in used:
                    continue
                used.add(text)
                wave, names, end = _speak(voice, text, Path(folder))
                columns["texts"].append(text)
                columns["voice"].append(index)
                columns["test"].append(voice != VOICES[-1] and len(waves) % TEST_EVERY == TEST_EVERY - 1)
                columns["samples"].append(len(wave))
                columns["segments"].append(len(names))
                columns["phone"].extend(names)
                columns["end"].extend(end)
                waves.append(wave)
        _encode(ASSETS / f"speech_{voice}.ogg", np.concatenate(waves))
        print(f"{voice}: {len(waves)} utterances, {sum(map(len, waves)) / SAMPLE_RATE:.0f} s")
    phones, phone = np.unique(np.array(columns["phone"]), return_inverse=True)
    np.savez_compressed(
        ASSETS / "speech_labels.npz",
        phones=phones,
        voices=np.array(VOICES),
        texts=np.array(columns["texts"]),
        voice=np.array(columns["voice"], dtype=np.uint8),
        test=np.array(columns["test"], dtype=bool),
        samples=np.array(columns["samples"], dtype=np.int32),
        segments=np.array(columns["segments"], dtype=np.int16),
        phone=phone.astype(np.uint8),
        end=np.array(columns["end"], dtype=np.int32),
    )
    size = sum(path.stat().st_size for path in ASSETS.glob("speech_*"))
    print(f"{len(phones)} phones, {len(columns['texts'])} utterances, {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
