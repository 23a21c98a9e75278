"""What turns a source into tokens, as frozen dataclasses: one front end per kind of source.

Apart from `run` because they also count tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Modality = Literal["image", "audio", "text"]
N = TypeVar("N", int, "Tensor")


def check(ok: bool, name: str, contract: str, value: object) -> None:
    if not ok:
        raise ValueError(f"config: {name} must be {contract}, got {value!r}")


def check_sizes(owner: object, section: str, **largest: int) -> None:
    """Each of these fields of `owner` is positive and at most so large.

    What sizes memory has a limit far above everything that is trained, so that a number of a damaged or
    foreign file is an error and no allocation.
    """
    for name, most in largest.items():
        value = getattr(owner, name)
        check(value > 0, f"{section}.{name}", "positive", value)
        check(value <= most, f"{section}.{name}", f"at most {most:,}", value)


WIDTH, DEPTH, TOKENS = 65_536, 1_000, 65_536
"""limits of `check_sizes`: channels of a layer, layers, tokens of a sample"""


def check_probability(name: str, value: float) -> None:
    check(0.0 <= value < 1.0, name, "in [0, 1)", value)


@dataclass(frozen=True, kw_only=True)
class ImageFront:
    """Patches of an image plus fixed 2-D sine-cosine positions and one CLS token."""

    modality: ClassVar[Modality] = "image"
    height: int = 224
    """pixels; a multiple of `patch`"""
    width: int = 224
    """pixels; a multiple of `patch`"""
    patch: int = 16
    """side of a square patch in pixels"""
    channels: int = 3
    extra_tokens: int = 1
    """CLS tokens put before the patches, without position"""

    def __post_init__(self) -> None:
        check_sizes(self, "front", patch=1_000, height=65_536, width=65_536, channels=1_000)
        for name in ("height", "width"):
            value = getattr(self, name)
            contract = f"a positive multiple of patch {self.patch}"
            check(value > 0 and value % self.patch == 0, f"front.{name}", contract, value)
        contract = f"so large that there are at most {TOKENS:,} patches"
        check(self.patches <= TOKENS, "front.patch", contract, self.patches)
        check(
            0 <= self.extra_tokens <= TOKENS, "front.extra_tokens", f"in 0 .. {TOKENS:,}", self.extra_tokens
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch, self.width // self.patch

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patch_size(self) -> int:
        """Values of a patch."""
        return self.channels * self.patch**2


@dataclass(frozen=True, kw_only=True)
class _Speech:
    """What both speech front ends share: sample rate, convolutional positions, ALiBi."""

    modality: ClassVar[Modality] = "audio"
    sample_rate: int = 16_000
    """Hz; files at another rate are resampled on load"""
    position_width: int = 95
    """receptive width of the convolutional positional encoder, split over its layers"""
    position_groups: int = 16
    position_layers: int = 5
    alibi: bool = True
    """linear attention bias over time, with one learned scale per head"""
    extra_tokens: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, "front", sample_rate=1_000_000, position_width=WIDTH, position_groups=WIDTH,
                    position_layers=DEPTH)  # fmt: skip
        check(
            0 <= self.extra_tokens <= TOKENS, "front.extra_tokens", f"in 0 .. {TOKENS:,}", self.extra_tokens
        )

    @property
    def position_kernel(self) -> int:
        """Kernel of each positional layer: max(3, width // layers)."""
        return max(3, self.position_width // self.position_layers)

    @property
    def strides(self) -> tuple[tuple[int, int], ...]:
        """(kernel, stride) of each step from samples to tokens."""
        raise NotImplementedError

    def frames(self, samples: N) -> N:
        """Tokens made from `samples` of waveform (0 when shorter than the receptive field)."""
        for kernel, stride in self.strides:
            samples = (samples - kernel) // stride + 1
        return samples * (samples > 0)


@dataclass(frozen=True, kw_only=True)
class WaveformFront(_Speech):
    """Seven strided convolutions over the raw waveform: 50 frames a second at 16 kHz."""

    conv_layers: tuple[tuple[int, int, int], ...] = (
        (512, 10, 5),
        *(((512, 3, 2),) * 4),
        *(((512, 2, 2),) * 2),
    )
    """(channels, kernel, stride) of each layer"""

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.conv_layers)
        check(0 < count <= DEPTH, "front.conv_layers", f"not empty, at most {DEPTH:,} layers", count)
        for layer in self.conv_layers:
            contract = f"positive triples, at most {WIDTH:,}"
            check(
                len(layer) == 3 and 0 < min(layer) <= max(layer) <= WIDTH,
                "front.conv_layers",
                contract,
                layer,
            )

    @property
    def width(self) -> int:
        """Channels of the last layer."""
        return self.conv_layers[-1][0]

    @property
    def strides(self) -> tuple[tuple[int, int], ...]:
        """(kernel, stride) of each step from samples to tokens."""
        return tuple((kernel, stride) for _, kernel, stride in self.conv_layers)

    @property
    def receptive_field(self) -> int:
        """Samples that one frame sees: the shortest waveform that makes a token."""
        size, jump = 1, 1
        for _, kernel, stride in self.conv_layers:
            size, jump = size + (kernel - 1) * jump, jump * stride
        return size


@dataclass(frozen=True, kw_only=True)
class LogMelFront(_Speech):
    """Log-mel frames, two stacked per token: a front end that does not learn, so cannot collapse.

    Not part of data2vec 2.0. At toy size the waveform encoder collapses (fairseq issue 5239);
    `audio_tiny` uses this one.
    """

    mels: int = 40
    window: int = 400
    """samples under one spectrum"""
    hop: int = 160
    """samples between spectra"""
    stack: int = 2
    """spectra joined into one token: 50 tokens a second at the defaults"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "front", mels=WIDTH, window=1_000_000, hop=1_000_000, stack=DEPTH)

    @property
    def width(self) -> int:
        """Values per token before the projection."""
        return self.mels * self.stack

    @property
    def strides(self) -> tuple[tuple[int, int], ...]:
        """(kernel, stride) of each step from samples to tokens."""
        return (self.window, self.hop), (self.stack, self.stack)

    @property
    def receptive_field(self) -> int:
        """Samples that one token sees."""
        return self.window + (self.stack - 1) * self.hop


@dataclass(frozen=True, kw_only=True)
class TextFront:
    """Token embedding plus learned positions, LayerNorm and dropout."""

    modality: ClassVar[Modality] = "text"
    vocab_size: int = 50_265
    """GPT-2's 50,257 byte-level tokens, fairseq's four specials, padded to a multiple of 8 plus <mask>"""
    max_positions: int = 512
    dropout: float = 0.1
    pad_id: int = 1
    """token id of <pad>; positions start at pad_id + 1"""
    mask_id: int = 3
    """token id of <mask> where an objective needs one: <unk>, which a byte-level vocabulary never reads"""
    extra_tokens: int = 0

    def __post_init__(self) -> None:
        check(
            self.vocab_size > self.pad_id >= 0,
            "front.vocab_size",
            f"above pad_id {self.pad_id}",
            self.vocab_size,
        )
        check(0 <= self.mask_id < self.vocab_size, "front.mask_id", "below vocab_size", self.mask_id)
        check_sizes(self, "front", vocab_size=100_000_000, max_positions=10_000_000)
        check_probability("front.dropout", self.dropout)


Front = ImageFront | WaveformFront | LogMelFront | TextFront
FRONTS: dict[str, type] = {
    "image": ImageFront,
    "waveform": WaveformFront,
    "logmel": LogMelFront,
    "text": TextFront,
}


def token_count(front: Front, shape: tuple[int, ...]) -> int:
    """Tokens of a sample of a source of `shape`: [B,C,H,W], [B,samples] or [B,T]."""
    if isinstance(front, ImageFront):
        return front.patches
    return shape[1] if isinstance(front, TextFront) else front.frames(shape[1])
