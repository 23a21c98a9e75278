"""Encoders of transformers as subjects of the probes: `d2v probe hf:FOLDER --data PATH`.

FOLDER is what `save_pretrained` wrote: wav2vec 2.0, HuBERT, WavLM and data2vec 1 for speech, BERT, RoBERTa
and their kin for text (with their tokenizer), ViT, BEiT and their kin for pictures. Nothing is downloaded and
no code of the folder is run. The data are read as for our own encoders: the same parts, the same labels of
frames, pictures normalised as the folder's preprocessor says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, DataConfig, ModelConfig, TargetConfig
from ..data import DataError, Labelled
from ..data.tokenizer import load_tokenizer
from ..fronts import Front, ImageFront, TextFront, WaveformFront
from ..model.frontends import padding_of, token_lengths
from ..normalisation import of_preprocessor

INPUTS = {"pixel_values": "image", "input_values": "audio", "input_ids": "text"}
"""what a model of transformers reads -> modality"""
POSITIONS_OF_ROBERTA = 2
"""places that its position table has before the first token"""


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
        """Output [B,E+T,D] of each layer, and the padding [B,T] (True) or None; see `Pretraining.outputs`."""
        if teacher:
            raise ValueError("features: weights must be student for a model of transformers, got teacher")
        (name,) = (key for key, modality in INPUTS.items() if modality == self.modality)
        given = {name: source}
        _, lengths = token_lengths(self.cfg.front, source, padding_mask)
        if padding_mask is not None:
            given["attention_mask"] = (~padding_mask).long()
        if (end := getattr(self.model.config, "segment_end_id", None)) is not None:
            given["token_type_ids"] = _segments(source, end)
        states = self.model(**given, output_hidden_states=True).hidden_states
        outputs = list(states[-self.cfg.depth :])
        return outputs, padding_of(lengths, outputs[0].shape[1] - self.cfg.front.extra_tokens)


def open_hf(folder: str, device: torch.device) -> tuple[HuggingFaceEncoder, Config, Path]:
    """The model of a folder, the config that its data are read with, and the folder.

    Raises ValueError where transformers is missing, the folder holds no model, or one of another kind.
    """
    transformers = import_transformers()
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"hf:{folder}: no config.json: a folder of `save_pretrained` is needed")
    try:
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"hf:{folder}: {reason}") from error
    reads = getattr(model, "main_input_name", None)
    if reads not in INPUTS:
        raise ValueError(f"hf:{folder}: a model that reads {', '.join(INPUTS)} is needed, this reads {reads}")
    front, data = _reading(model, Path(folder), INPUTS[reads])
    _read_segments(model.config, Path(folder))
    encoder = HuggingFaceEncoder(model, front).to(device).eval()
    return encoder, Config(preset=f"hf:{folder}", model=encoder.cfg, data=data), Path(folder)


def open_hf_texts(folder: str, data: str, cfg: Config) -> Labelled:
    """The labelled texts of `data` in the folder's own tokens. DataError for what `open_labelled` refuses."""
    from ..data.text import open_tokenized

    tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.is_fast:
        raise DataError(f"hf:{folder}: its tokenizer is not a fast one (tokenizer.json is missing)")
    begin = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if begin is None or end is None or tokenizer.pad_token_id is None:
        raise DataError(f"hf:{folder}: its tokenizer has no tokens for begin, end and padding")
    specials = (begin, tokenizer.pad_token_id, end)
    return open_tokenized(data, tokenizer.backend_tokenizer, cfg.data.block, specials)


def _read_segments(config: Any, folder: Path) -> None:
    """Note in the config which token ends a text, as "segment_end_id", where the model embeds which text of a
    pair a token is of and the tokenizer tells them apart: BERT's does, RoBERTa's does not."""
    file = folder / "tokenizer.json"
    if (getattr(config, "type_vocab_size", None) or 0) < 2 or not file.is_file():
        return
    pair = load_tokenizer(file).encode("", "")
    if 1 in pair.type_ids:
        config.segment_end_id = pair.ids[-1]


def _segments(source: Tensor, end: int) -> Tensor:
    """[B,T] int64: 0 up to the first `end` of a row, 1 after it."""
    ends = (source == end).long()
    return (ends.cumsum(1) - ends).clamp(max=1)


def import_transformers() -> Any:
    """The package. ValueError where it is missing."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError("hf: models need the package transformers: pip install transformers") from None
    return transformers


def _reading(model: Any, folder: Path, modality: str) -> tuple[Front, DataConfig]:
    """How a model's data are read: front end and normalisation."""
    config = model.config
    if modality == "audio":
        missing = [name for name in ("conv_dim", "conv_kernel", "conv_stride") if not hasattr(config, name)]
        if missing:
            raise ValueError(
                f"hf:{folder}: its config has no {missing[0]}: how many frames it makes is unknown"
            )
        layers = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
        return WaveformFront(conv_layers=tuple(layers), alibi=False), DataConfig()
    if modality == "text":
        offset = POSITIONS_OF_ROBERTA if config.pad_token_id == 1 else 0
        longest = config.max_position_embeddings - offset
        text = TextFront(vocab_size=config.vocab_size, max_positions=longest, pad_id=config.pad_token_id)
        return text, DataConfig(block=min(512, longest))
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    channels = config.num_channels
    with torch.no_grad():
        made = model(pixel_values=torch.zeros(1, channels, height, width)).last_hidden_state.shape[1]
    extra = made - (height // patch) * (width // patch)
    if extra < 0:
        raise ValueError(f"hf:{folder}: its {made} tokens are no grid of patches of {patch} pixels")
    front = ImageFront(height=height, width=width, patch=patch, channels=channels, extra_tokens=extra)
    known = of_preprocessor(folder, channels)
    return front, DataConfig() if known is None else DataConfig(mean=known.mean, std=known.std)
