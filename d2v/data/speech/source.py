"""Utterances as training samples: normalised whole, grouped by length, cropped or padded.

An utterance is normalised (zero mean, unit variance; see `data.wave_norm`) before it is cropped. A global
step takes as many utterances of neighbouring length as fit into `data.batch` seconds and cuts them to the
shortest, at an offset drawn from (seed, epoch, utterance), or with `data.pad` pads them to the longest. To
what length is a matter of the whole step, so that micro-batches do not change it. With `data.bucket_seconds`
it is a multiple of that, so that a run has few shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...config.fronts import LogMelFront, WaveformFront
from ...config.run import Channels, Config
from ..embedded import speech
from ..loader import AUGMENT, ORDER, SUBSTITUTE, Source, generator, windows
from ..types import Batch
from .files import Utterances
from .reading import Header, resample

BUCKET = 0.1
"""seconds: lengths closer than this count as equal, so that the company in a batch changes every epoch"""
WAVE_EPS = {"fairseq": 1e-5, "transformers": 1e-7}
"""added to a waveform's variance: fairseq/data/audio/raw_audio_dataset.py (layer_norm), and transformers'
Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm"""


def normalise_wave(wave: Tensor, norm: str) -> Tensor:
    """A waveform [samples] as `data.wave_norm` says."""
    return wave if norm == "none" else F.layer_norm(wave, wave.shape, eps=WAVE_EPS[norm])


class SpeechUtterances(Utterances):
    """Utterances of the embedded set, at the front end's sample rate."""

    def __init__(self, numbers: np.ndarray, rate: int) -> None:
        """numbers: [n] int64, indices into `speech.utterances()`"""
        self.numbers, self.rate = numbers, rate
        chosen = [speech.utterances()[i] for i in numbers]
        self.names = [f"speech/{u.name}" for u in chosen]
        headers = [Header(u.samples, speech.SAMPLE_RATE, 1, "OGG OPUS") for u in chosen]
        self.lengths = np.array([header.samples(rate) for header in headers], dtype=np.int64)

    def wave(self, index: int, channels: Channels = "mix") -> np.ndarray:
        return resample(speech.utterances()[self.numbers[index]].wave(), speech.SAMPLE_RATE, self.rate)

    def select(self, keep: np.ndarray) -> SpeechUtterances:
        return SpeechUtterances(self.numbers[keep], self.rate)


@dataclass(frozen=True)
class _Epoch:
    steps: list[np.ndarray]
    step_of: np.ndarray
    """[n] int64: the step an utterance belongs to"""
    target: np.ndarray
    """[n] int64: samples it is cropped to, or with data.pad its step is padded to"""


class AudioSource(Source):
    """Utterances as training samples."""

    def __init__(self, path: str, utterances: Utterances, cfg: Config) -> None:
        super().__init__(path, cfg.train.seed, cfg.data.batch, cfg.data.shuffle_window)
        self.utterances = utterances
        assert isinstance(cfg.model.front, (WaveformFront, LogMelFront))
        self.rate = cfg.model.front.sample_rate
        self.pad, self.wave_norm, self.channels = cfg.data.pad, cfg.data.wave_norm, cfg.data.channels
        self.multiple = max(1, round(cfg.data.bucket_seconds * self.rate))
        self.capped = np.minimum(utterances.lengths, int(cfg.data.max_seconds * self.rate))
        """[n] int64: samples of each utterance after the crop to data.max_seconds"""
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        return len(self.utterances)

    def name(self, index: int) -> str:
        return self.utterances.names[index]

    def steps(self, epoch: int) -> list[np.ndarray]:
        """Every utterance once; a step holds at most data.batch seconds, counted at its longest utterance."""
        return self._epoch(epoch).steps

    def split(self, ids: np.ndarray, micro: int) -> list[np.ndarray]:
        """At most `micro` seconds each, but at least one utterance."""
        return super().split(ids, max(1, int(micro * self.rate // self._common_length(ids))))

    def substitute(self, index: int, epoch: int, attempt: int) -> int:
        """Another utterance of the same step, which is cropped alike; of any step when there is none."""
        table = self._epoch(epoch)
        peers = table.steps[table.step_of[index]]
        rng = generator(self.seed, SUBSTITUTE, epoch, index, attempt)
        return int(rng.choice(peers) if len(peers) > 1 else rng.integers(len(self)))

    def read(self, index: int, epoch: int | None) -> Tensor:
        """[samples] float32, normalised: cropped when training, whole otherwise."""
        wave = torch.from_numpy(self.utterances.wave(index, self.channels))
        wave = normalise_wave(wave, self.wave_norm)
        if epoch is None:
            return wave
        length = int(min(self._epoch(epoch).target[index], self.capped[index]))
        start = int(generator(self.seed, AUGMENT, epoch, index).integers(len(wave) - length + 1))
        return wave[start : start + length]

    def collate(self, items: list[Tensor], ids: np.ndarray, epoch: int | None) -> Batch:
        """source [B,samples]; padding_mask only where something is padded."""
        lengths = [len(item) for item in items]
        if epoch is None:
            samples = max(lengths)
        elif self.pad:
            samples = int(self._epoch(epoch).target[ids].max())
        else:
            samples = min(lengths)
        source = torch.stack([F.pad(item, (0, max(0, samples - len(item))))[:samples] for item in items])
        padding = None
        if min(lengths) < samples:
            padding = torch.arange(samples) >= torch.tensor(lengths)[:, None]
        kept = [min(length, samples) for length in lengths]
        return Batch(source, torch.from_numpy(ids), epoch or 0, padding, lengths=kept)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            # prefetching crosses the border between two epochs, never more
            self._epochs = {e: table for e, table in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs[epoch] = self._plan(epoch)
        return self._epochs[epoch]

    def _common_length(self, ids: np.ndarray) -> int:
        """Samples that the utterances of a step are padded or cropped to."""
        if self.pad:
            return -int(-self.capped[ids].max() // self.multiple) * self.multiple
        shortest = int(self.capped[ids].min())
        return shortest // self.multiple * self.multiple or shortest

    def _plan(self, epoch: int) -> _Epoch:
        """The steps of each window in turn."""
        rng = generator(self.seed, ORDER, epoch)
        steps = [ids for some in windows(rng, len(self), self.window) for ids in self._cut(some, rng)]
        step_of = np.empty(len(self), dtype=np.int64)
        target = np.empty(len(self), dtype=np.int64)
        for number, ids in enumerate(steps):
            step_of[ids] = number
            target[ids] = self._common_length(ids)
        return _Epoch(steps, step_of, target)

    def _cut(self, window: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Sort by length, longest first and ties by chance, cut into steps, shuffle the steps.

        Source: fairseq, RawAudioDataset.ordered_indices and batch_by_size; BUCKET is ours.
        """
        tie, capped = rng.permutation(len(window)), self.capped[window]
        order = np.lexsort((tie, capped // int(BUCKET * self.rate)))[::-1]
        budget, longest, first = self.batch * self.rate, 0, 0
        cuts: list[int] = []
        # counted at the upper end of the bucket, so that a bucket's steps hold equally many
        counted = np.minimum(-(-capped // self.multiple) * self.multiple, budget)
        for place, length in enumerate(counted[order].tolist()):
            longest = max(longest, length)
            if (place - first + 1) * longest > budget:
                cuts.append(place)
                first, longest = place, length
        parts = np.split(window[order], cuts)
        return [parts[i] for i in rng.permutation(len(parts))]
