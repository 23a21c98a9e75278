"""Encoders of transformers as subjects of the probes: `d2v probe hf:FOLDER --data PATH`.

FOLDER is what `save_pretrained` wrote: wav2vec 2.0, HuBERT, WavLM and data2vec 1 for speech, BERT, RoBERTa
and their kin for text (with their tokenizer), ViT, DINOv2, MAE, BEiT and their kin for pictures. Nothing is
downloaded and no code of the folder is run. The data are read as for our own encoders: the same parts, the
same labels of frames, pictures cut alike. The folder's preprocessor says at what rate speech is read and
whether it is normalised, and of pictures the size and the normalisation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..config.fronts import Front, ImageFront, TextFront, WaveformFront
from ..config.run import Config, DataConfig
from ..data.normalisation import of_image_processor
from ..data.speech.reading import MIN_RATE
from ..data.text.tokenizer import load_tokenizer, uncut
from ..data.types import DataError, Labelled
from ..model.huggingface import INPUTS, HuggingFaceEncoder, import_transformers
from .folder import TOKENIZER
from .hf_folder import check_picture, one_line, open_pretrained, read_preprocessor, sides

POSITIONS_OF_ROBERTA = 2
"""places that its position table has before the first token"""


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
    from ..data.text.pipeline import open_tokenized

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
    return open_tokenized(data, uncut(tokenizer.backend_tokenizer), cfg.data, specials)


def _read_segments(config: Any, folder: Path) -> None:
    """Note in the config which token ends a text, as "segment_end_id", where the model embeds which text of a
    pair a token is of and the tokenizer tells them apart: BERT's does, RoBERTa's does not."""
    file = folder / TOKENIZER
    if (getattr(config, "type_vocab_size", None) or 0) < 2 or not file.is_file():
        return
    pair = load_tokenizer(file).encode("", "")
    if 1 in pair.type_ids:
        config.segment_end_id = pair.ids[-1]


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
