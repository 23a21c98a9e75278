"""A model of transformers under the heads of fine-tuning: `d2v finetune hf:FOLDER`.

Its architecture is the JSON of its config, which the run's own config keeps, so that a run needs the folder
no more once it has begun. Dropouts are those of that config; its random masks give way to the recipe's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointError
from ..config import ModelConfig
from .encoder import HuggingFaceEncoder
from .folder import import_transformers


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
