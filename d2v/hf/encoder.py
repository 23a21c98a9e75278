"""Encoders of transformers as subjects of the probes: `d2v probe hf:FOLDER --data PATH`.

FOLDER is what `save_pretrained` wrote: wav2vec 2.0, HuBERT, WavLM and data2vec 1 for speech, BERT, RoBERTa
and their kin for text (with their tokenizer), ViT, DINOv2, MAE, BEiT and their kin for pictures. Nothing is
downloaded and no code of the folder is run. The data are read as for our own encoders: the same parts, the
same labels of frames, pictures cut alike. The folder's preprocessor says at what rate speech is read and
whether it is normalised, and of pictures the size and the normalisation.

A layer is the output of one block as it is, but for the last one, which is the model's `last_hidden_state`:
models that normalise before their blocks (ViT, DINOv2, MAE; wav2vec 2.0 and its kin with
do_stable_layer_norm) put one more norm after the last. Whether `hidden_states[-1]` has passed that norm
depends on the model and on the release of transformers, so it is not read.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config, DataConfig, ModelConfig, TargetConfig
from ..data import DataError, Labelled
from ..data.audio_files import MIN_RATE
from ..data.tokenizer import load_tokenizer
from ..fronts import Front, ImageFront, TextFront, WaveformFront
from ..model.frontends import padding_of, token_lengths
from ..normalisation import of_image_processor
from .folder import check_picture, import_transformers, one_line, open_pretrained, read_preprocessor, sides

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
            order = torch.arange(front.grid[0] * front.grid[1], dtype=torch.float32, device=source.device)
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


def open_hf(folder: str, device: torch.device) -> tuple[HuggingFaceEncoder, Config, Path]:
    """The model of a folder in fp32, the config that its data are read with, and the folder.

    One printed line says how speech and pictures are read. Raises ValueError where transformers is missing,
    the folder holds no model, or one of another kind.
    """
    model: Any = open_pretrained(Path(folder))
    reads = getattr(model, "main_input_name", None)
    if reads not in INPUTS:
        raise ValueError(f"hf:{folder}: a model that reads {', '.join(INPUTS)} is needed, this reads {reads}")
    read = {"image": _pictures, "audio": _speech, "text": _text}[INPUTS[reads]]
    try:
        front, data, said = read(model, Path(folder))
        _read_segments(model.config, Path(folder))
        encoder = HuggingFaceEncoder(model, front).to(device).eval()
    except (ValueError, AttributeError) as error:  # a config without something that encoders have
        raise one_line(folder, error) from error
    if said:
        print(f"hf:{folder}: {said}")
    return encoder, Config(preset=f"hf:{folder}", model=encoder.cfg, data=data), Path(folder)


def open_hf_texts(folder: str, data: str, cfg: Config) -> Labelled:
    """The labelled texts of `data` in the folder's own tokens. DataError for what `open_labelled` refuses."""
    from ..data.text import open_tokenized

    transformers = import_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as in `open_pretrained`
        raise one_line(folder, error) from error
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


def _speech(model: Any, folder: Path) -> tuple[Front, DataConfig, str]:
    """How waveforms are read: rate and normalisation as the preprocessor says, or as its class does without
    a file (wav2vec 2.0's: 16 kHz, normalised)."""
    config = model.config
    for name in ("conv_dim", "conv_kernel", "conv_stride"):
        if not hasattr(config, name):
            raise ValueError(f"its config has no {name}: how many frames it makes is unknown")
    known = read_preprocessor(folder, "feature_extractor")
    rate, normalised = known.get("sampling_rate", 16_000), known.get("do_normalize", True)
    if isinstance(rate, bool) or not isinstance(rate, int) or rate < MIN_RATE:
        raise ValueError(f"its preprocessor's sampling_rate must be at least {MIN_RATE} Hz, got {rate!r}")
    if not isinstance(normalised, bool):
        raise ValueError(f"its preprocessor's do_normalize must be true or false, got {normalised!r}")
    group = getattr(config, "feat_extract_norm", "layer") == "group"
    config.masks_padding = bool(known.get("return_attention_mask", not group))
    layers = tuple(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True))
    front = WaveformFront(conv_layers=layers, alibi=False, sample_rate=rate)
    said = (
        f"speech is read at {rate:,} Hz, other rates are resampled, "
        f"{'each utterance is normalised' if normalised else 'and it is not normalised'}"
        f"{'' if known else ' (its preprocessor_config.json is missing: the defaults)'}"
    )
    return front, DataConfig(wave_norm="transformers" if normalised else "none"), said


def _text(model: Any, folder: Path) -> tuple[Front, DataConfig, str]:
    config = model.config
    if config.pad_token_id is None:
        raise ValueError("its config has no pad_token_id")
    offset = POSITIONS_OF_ROBERTA if config.pad_token_id == 1 else 0
    longest = config.max_position_embeddings - offset
    text = TextFront(vocab_size=config.vocab_size, max_positions=longest, pad_id=config.pad_token_id)
    return text, DataConfig(block=min(512, longest)), ""


def _pictures(model: Any, folder: Path) -> tuple[Front, DataConfig, str]:
    """How pictures are read: cut as for our own encoders, to the size that the preprocessor makes."""
    config = model.config
    if hasattr(config, "mask_ratio"):  # MAE's encoder hides patches by itself
        config.mask_ratio = 0.0
    patch, other = sides(config.patch_size, "patch_size")
    if patch != other:
        raise ValueError(f"patch_size of its config must be square, got {config.patch_size}")
    known = read_preprocessor(folder, "image_processor")
    for name in ("do_flip_channel_order", "do_grayscale", "rescale_offset"):
        if known.get(name):
            raise ValueError(f"its preprocessor's {name} is not supported")
    height, width = _size(known) or sides(config.image_size, "image_size")
    check_picture(height, width, patch)
    channels = config.num_channels
    try:
        with torch.no_grad():
            made = model(pixel_values=torch.zeros(1, channels, height, width)).last_hidden_state.shape[1]
    except Exception as error:  # of whatever kind a model refuses a size with
        raise ValueError(f"it does not read {height} x {width} pixels: {error}") from error
    extra = made - (height // patch) * (width // patch)
    if extra < 0:
        raise ValueError(f"its {made} tokens are no grid of patches of {patch} pixels")
    front = ImageFront(height=height, width=width, patch=patch, channels=channels, extra_tokens=extra)
    value = of_image_processor(known, channels, f"hf:{folder}: its preprocessor")
    data = DataConfig() if value is None else DataConfig(mean=value.mean, std=value.std)
    how = "as ours (its preprocessor_config.json says nothing of it)" if value is None else f"with {value}"
    return front, data, f"pictures are cut to {height} x {width} pixels and normalised {how}"


def _size(known: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width that a preprocessor makes; None where it leaves pictures as they are."""
    if known.get("do_center_crop") and known.get("crop_size") is not None:
        return sides(known["crop_size"], "its preprocessor's crop_size")
    if known.get("do_resize", True) and known.get("size") is not None:
        return sides(known["size"], "its preprocessor's size")
    return None
