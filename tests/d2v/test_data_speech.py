"""The embedded speech set: what it holds, and that its labels lie on the sound."""

from __future__ import annotations

import numpy as np
import pytest

from d2v.config.presets import preset
from d2v.data.embedded import speech
from d2v.data.open import open_data, open_labelled
from d2v.data.types import Position

RATE = 16_000


def test_embedded_set_is_what_it_says() -> None:
    every = speech.utterances()
    minutes = {name: sum(u.samples for u in every if u.split == name) / RATE / 60 for name in speech.SPLITS}
    assert 19 < sum(minutes.values()) < 22
    assert minutes["test"] / (minutes["train"] + minutes["test"]) == pytest.approx(0.15, abs=0.02)
    assert {u.voice for u in every if u.split == "unseen_voice"} == {"awb"}
    assert {u.voice for u in every if u.split == "train"} == {"slt", "rms", "kal16"}
    assert len({u.text for u in every}) == len(every), "every utterance is a sentence of its own"
    assert sum(path.stat().st_size for path in speech.ASSETS.glob("speech_*")) <= 4 * 2**20
    for split in speech.SPLITS:
        spoken = np.unique(np.concatenate([u.phones for u in every if u.split == split]))
        assert len(spoken) == len(speech.phone_names()) == 41, split
    for u in every:
        assert u.ends[-1] == u.samples and (np.diff(u.ends) >= 0).all() and len(u.ends) == len(u.phones)


@pytest.mark.parametrize("voice", ["slt", "rms", "kal16", "awb"])
def test_labels_lie_on_the_sound_after_the_codec(voice: str) -> None:
    """Labelled silence is silent, and labels explain the loudness best when they are not shifted."""
    frame, shifts = 80, np.arange(-16, 17)  # 5 ms; 80 ms either way
    loudness: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for u in [u for u in speech.utterances() if u.voice == voice]:
        wave = u.wave()
        assert wave.dtype == np.float32 and len(wave) == u.samples and 0.1 < np.abs(wave).max() <= 1
        frames = wave[: len(wave) // frame * frame].reshape(-1, frame).astype(np.float64)
        loudness.append(np.log10((frames**2).mean(1) + 1e-8)[20:-20])
        centres = (np.arange(20, len(frames) - 20) + 0.5) * frame
        labels.append(u.phones_at(centres[:, None] + shifts * frame))
    sound, label = np.concatenate(loudness), np.concatenate(labels)
    silent = label[:, len(shifts) // 2] == speech.phone_names().index("pau")
    assert sound[silent].mean() < sound[~silent].mean() - 2, "silence is 20 dB below speech"
    sound -= sound.mean()
    explained = [
        sum(sound[column == phone].sum() ** 2 / (column == phone).sum() for phone in np.unique(column))
        for column in label.T
    ]
    assert abs(shifts[int(np.argmax(explained))]) * frame / RATE <= 0.02


@pytest.mark.parametrize("name", ["audio_tiny", "audio_base"])
def test_phone_labels_are_at_the_centre_of_each_token(name: str) -> None:
    cfg = preset(name)
    labelled = open_labelled("speech", cfg)
    assert list(labelled.splits) == ["train", "test", "unseen_voice"] and labelled.level == "token"
    assert len(labelled.classes) == 41
    split = labelled.splits["test"]
    source, padding, labels = next(split.batches(3))
    utterances = [u for u in speech.utterances() if u.split == "test"]
    front = cfg.model.front
    centre = front.receptive_field // 2  # 200 samples (waveform), 280 (two spectra)
    assert source.shape[0] == 3 and labels.shape == (3, front.frames(source.shape[1]))
    for row, u in enumerate(utterances[:3]):
        tokens = front.frames(u.samples)
        by_hand = []
        for token in range(tokens):
            position = token * 320 + centre
            by_hand.append(next(p for p, end in zip(u.phones, u.ends, strict=True) if position < end))
        assert labels[row, :tokens].tolist() == by_hand
        assert labels[row, tokens:].eq(-1).all()
        assert padding is not None and padding[row].sum() == source.shape[1] - u.samples
    features, target = split.raw()
    assert features.shape[0] == len(target) == sum(front.frames(u.samples) for u in utterances)
    assert features.dtype == np.float32 and np.isfinite(features).all()


def test_embedded_training_never_hears_test_or_unseen_voice() -> None:
    pipeline = open_data("speech", preset("audio_tiny"))
    by_name = {f"speech/{u.name}": u for u in speech.utterances()}
    heard: set[str] = set()
    for step in pipeline.micro_batches(Position(), 16):
        heard |= {pipeline.source.name(i) for batch in step for i in batch.ids.tolist()}
        if pipeline.position.epoch:
            break
    assert {by_name[name].split for name in heard} == {"train"}
    assert len(heard) == sum(u.split == "train" for u in speech.utterances())
