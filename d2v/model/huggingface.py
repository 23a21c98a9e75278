"""A model of transformers, as an encoder for probes and under the heads of fine-tuning.

A layer is the output of one block as it is, but for the last one, which is the model's
`last_hidden_state`: models that normalise before their blocks (ViT, DINOv2, MAE; wav2vec 2.0 and its kin
with do_stable_layer_norm) put one more norm after the last. Whether `hidden_states[-1]` has passed that
norm depends on the model and on the release of transformers, so it is not read.

Its architecture is the JSON of its config, which the run's own config keeps, so that a run needs the folder
no more once it has begun. Dropouts are those of that config; its random masks give way to the recipe's.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.fronts import Front, ImageFront, WaveformFront
from ..config.model import ModelConfig, TargetConfig
from ..config.toml import CheckpointError
from .feature_encoder import padding_of, token_lengths
from .pretraining import Pretraining

INPUTS = {"pixel_values": "image", "input_values": "audio", "input_ids": "text"}
"""what a model of transformers reads -> modality"""


class HuggingFaceEncoder(nn.Module):
    """A model of transformers with the methods that probes ask of ours.

    model: an encoder with `hidden_states`. front: how its data are read.
    """

    def __init__(self, model: nn.Module, front: Front) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        depth = int(config.num_hidden_layers)
        self.cfg = ModelConfig(
            front=front, dim=config.hidden_size, heads=config.num_attention_heads, depth=depth,
            target=TargetConfig(top_k=1),
        )  # fmt: skip

    @property
    def modality(self) -> str:
        return self.cfg.modality

    @property
    def architecture(self) -> str:
        """JSON of the model's config."""
        config: Any = self.model.config
        return json.dumps(config.to_dict())

    def outputs(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        *,
        teacher: bool = False,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Output [B,E+T,D] of each layer, and the padding [B,T] (True) or None; see `Pretraining.outputs`.

        Utterances of different lengths pass one at a time: the group norm of some models and the
        convolutions that give others their positions would let features depend on the padding of the batch.
        """
        if teacher:
            raise ValueError("features: weights must be student for a model of transformers, got teacher")
        return self._encode(source, padding_mask, layers=self.cfg.depth, together=False)

    def last(
        self, source: Tensor, padding_mask: Tensor | None = None, *, together: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The last layer's output [B,E+T,D] and the padding, as `outputs`, without the other layers.

        together: utterances of different lengths pass as one batch, which models see as they were trained:
        with an attention mask, or where the preprocessor's return_attention_mask is False (group norm)
        padded with zeros alone.
        """
        (x,), padding = self._encode(source, padding_mask, layers=1, together=together)
        return x, padding

    def _encode(
        self, source: Tensor, padding_mask: Tensor | None, layers: int, together: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """The last `layers` layers, and the padding."""
        front = self.cfg.front
        samples, lengths = token_lengths(front, source, padding_mask)
        if samples is None or together or not isinstance(front, WaveformFront):
            outputs = self._pass(source, padding_mask, layers)
        else:
            tokens, rows = front.frames(source.shape[1]), []
            for wave, count in zip(source, samples.tolist(), strict=True):
                if not front.frames(count):  # shorter than what one frame sees
                    rows.append([source.new_zeros(1, tokens, self.cfg.dim)] * layers)
                    continue
                made = self._pass(wave[None, :count], None, layers)
                rows.append([F.pad(x, (0, 0, 0, tokens - x.shape[1])) for x in made])
            outputs = [torch.cat(of_layer) for of_layer in zip(*rows, strict=True)]
        return outputs, padding_of(lengths, outputs[-1].shape[1] - front.extra_tokens)

    def _pass(self, source: Tensor, padding_mask: Tensor | None, layers: int) -> list[Tensor]:
        """The last `layers` layers of a batch as it is."""
        config: Any = self.model.config
        front = self.cfg.front
        (name,) = (key for key, modality in INPUTS.items() if modality == self.modality)
        given: dict[str, Any] = {name: source}
        if padding_mask is not None and getattr(config, "masks_padding", True):
            given["attention_mask"] = (~padding_mask).long()
        if (end := getattr(config, "segment_end_id", None)) is not None:
            given["token_type_ids"] = _segments(source, end)
        if isinstance(front, ImageFront) and "noise" in inspect.signature(self.model.forward).parameters:
            order = torch.arange(front.patches, dtype=torch.float32, device=source.device)
            given["noise"] = order.expand(len(source), -1)  # MAE's encoder sorts its patches by it
        made = self.model(**given, output_hidden_states=layers > 1, return_dict=True)
        last: Tensor = made.last_hidden_state
        if isinstance(front, WaveformFront) and last.shape[1] != front.frames(source.shape[1]):
            raise ValueError(
                f"hf: {config.model_type} makes {last.shape[1]} frames of {source.shape[1]} samples, its "
                f"config says {front.frames(source.shape[1])}"
            )
        if layers == 1:
            return [last]
        states = list(made.hidden_states or ())[-layers:-1]
        if len(states) != layers - 1 or any(x.shape != last.shape for x in states):
            raise ValueError(
                f"hf: {config.model_type} has layers of other shapes than its output: no features"
            )
        return [*states, last]


def _segments(source: Tensor, end: int) -> Tensor:
    """[B,T] int64: 0 up to the first `end` of a row, 1 after it."""
    ends = (source == end).long()
    return (ends.cumsum(1) - ends).clamp(max=1)


OLDEST = (4, 57)
"""release of transformers"""


def import_transformers() -> Any:
    """The package. ValueError where it is missing or too old."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError("hf: models need the package transformers: pip install transformers") from None
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise ValueError(
            f"hf: models need transformers {wanted} or newer, this is {transformers.__version__}"
        )
    return transformers


class HuggingFaceBackbone(nn.Module):
    """What `Backbone` is for our encoders. architecture: JSON of a config of transformers."""

    def __init__(self, architecture: str, cfg: ModelConfig) -> None:
        super().__init__()
        transformers = import_transformers()
        values = json.loads(architecture)
        values.pop("auto_map", None)
        config = transformers.AutoConfig.for_model(**values)
        model = transformers.AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.config.mask_time_prob = model.config.mask_feature_prob = 0.0
        self.encoder = HuggingFaceEncoder(model, cfg.front)
        self.compute_dtype = torch.float32

    def forward(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        time_mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Backbone.forward`, but masked frames become the model's own mask embedding, if it has one,
        or 0; noise is not read.

        In training utterances pass as one batch, see `HuggingFaceEncoder.last`; in eval mode one at a time.
        """
        together = self.training or time_mask is not None or channel_mask is not None
        with self._precision(source.device), self._masked(time_mask, channel_mask):
            x, padding = self.encoder.last(source, padding_mask, together=together)
        return x.float(), padding

    def fill(self, pretrained: HuggingFaceEncoder) -> None:
        """Take the weights of the opened model."""
        self.encoder.load_state_dict(pretrained.state_dict())

    def freeze_front(self) -> None:
        """The convolutions of a waveform's front end keep their weights. ValueError for a model without."""
        freeze = getattr(self.encoder.model, "freeze_feature_encoder", None)
        if freeze is None:
            raise ValueError("finetune: train.freeze_front needs a model that reads waveforms")
        freeze()

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self.compute_dtype)

    def _masked(self, time: Tensor | None, channels: Tensor | None) -> AbstractContextManager[Any]:
        """Projected features of speech with frames [B,T] replaced and channels [B,D] at 0."""
        projection = getattr(self.encoder.model, "feature_projection", None)
        if projection is None or (time is None and channels is None):
            return nullcontext()
        embedding = getattr(self.encoder.model, "masked_spec_embed", None)

        def changed(x: Tensor) -> Tensor:
            if time is not None:
                with_what = x.new_zeros(()) if embedding is None else embedding.to(x.dtype)
                x = torch.where(time.unsqueeze(2), with_what, x)
            return x if channels is None else x.masked_fill(channels.unsqueeze(1), 0.0)

        def hook(module: nn.Module, given: Any, made: Any) -> Any:
            return (changed(made[0]), *made[1:]) if isinstance(made, tuple) else changed(made)

        return _Hook(projection, hook)


@contextmanager
def naming_release(architecture: str | None) -> Iterator[None]:
    """Weights that do not fit inside the block: CheckpointError says so if another release named them.

    Files of transformers keep their names from release to release, its modules do not (ViT's in 5.x).
    architecture: as of `HuggingFaceBackbone`; None: a model of ours.
    """
    try:
        yield
    except CheckpointError as error:
        made = None if architecture is None else json.loads(architecture).get("transformers_version")
        if made is None or made == (here := import_transformers().__version__):
            raise
        raise CheckpointError(
            f"{error}; the run was made with transformers {made}, this is {here}, whose names may differ"
        ) from error


class _Hook(AbstractContextManager[None]):
    """A forward hook as long as a block runs."""

    def __init__(self, module: nn.Module, hook: Any) -> None:
        self.handle = module.register_forward_hook(hook)

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


Encoder = Pretraining | HuggingFaceEncoder
"""what features are taken from"""
