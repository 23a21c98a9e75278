"""A folder of `save_pretrained`: what its files say, and the model in it.

Sizes that the config declares are held against the headers of the weights before anything is allocated.
Nothing of a folder is run: pickled weights and models that need code of their own are refused. Weights open
in fp32, whatever they were saved in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..data.normalisation import PREPROCESSOR
from ..model.huggingface import import_transformers
from .folder import CONFIG, WEIGHTS

INDEX = f"{WEIGHTS}.index.json"
MAX_SIDE = 8_192
"""pixels of a picture that a model may ask for"""
MAX_PATCHES = 65_536
UNREAD = re.compile(r"pooler|mask_token|masked_spec_embed")
"""parameters that a folder may lack: of a model's own pooling, which no feature passes, and of masks"""
_REPEATED = re.compile(r"^(num|n)_.*(layer|block|expert)")
"""names of settings that count parts of a model, each with weights"""


def is_ours(folder: str | Path) -> bool:
    """Whether `d2v convert --to hf` wrote it: d2v opens such a folder without transformers."""
    return "d2v" in (read_json(Path(folder) / CONFIG) or {})


def open_pretrained(folder: Path) -> nn.Module:
    """The model of a folder on the CPU, in eval mode, in fp32. ValueError, in one line, for what is wrong."""
    transformers = import_transformers()
    values = read_json(folder / CONFIG)
    if values is None:
        raise ValueError(f"hf:{folder}: no config.json: a folder of `save_pretrained` is needed")
    if "auto_map" in values and values.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"hf:{folder}: {values.get('model_type')!r} needs code of the folder's own (auto_map of its "
            "config.json), which is never run"
        )
    if values.get("add_adapter"):
        raise ValueError(
            f"hf:{folder}: add_adapter of its config.json must be false: an adapter changes the frames' rate"
        )
    shapes = weight_shapes(folder)
    _check_repeats(folder, values, len(shapes))
    chosen: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **chosen)
        check_sizes(folder, config, shapes)
        with _quiet(transformers.utils.logging):
            model, found = transformers.AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **chosen,
            )
    except Exception as error:  # of every kind, on folders that are broken in as many ways
        raise one_line(folder, error) from error
    wrong = sorted(key if isinstance(key, str) else key[0] for key in found["mismatched_keys"])
    if wrong:  # 5.x adds the shapes to the names
        raise ValueError(
            f"hf:{folder}: {len(wrong)} weights have other shapes than its config says, the first: {wrong[0]}"
        )
    if missing := sorted(name for name in found["missing_keys"] if not UNREAD.search(name)):
        raise ValueError(f"hf:{folder}: {len(missing)} weights are missing, the first: {missing[0]}")
    return model.eval()


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """transformers' loading without its progress bar and its report, of which we read what matters."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def check_sizes(folder: Path, config: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError where a config's model is not of the weights' sizes; nothing is allocated."""
    transformers = import_transformers()
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} has a decoder: an encoder is needed")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if not hasattr(config, name):
            raise ValueError(f"its config has no {name}")
        _whole(getattr(config, name), name)
    _check_repeats(folder, {"num_hidden_layers": config.num_hidden_layers}, len(shapes))
    if not any(config.hidden_size in shape for shape in shapes.values()):
        raise ValueError(f"hidden_size of its config is {config.hidden_size:,}, no weight has that size")
    if getattr(config, "image_size", None) is not None:
        check_picture(*sides(config.image_size, "image_size"), sides(config.patch_size, "patch_size")[0])
    with torch.device("meta"), _at_most(4 * len(shapes) + 64):
        made = transformers.AutoModel.from_config(config, trust_remote_code=False)
    wanted = sum(p.numel() for p in made.parameters())
    held = sum(torch.Size(shape).numel() for shape in shapes.values())
    if wanted > 2 * held:  # a pooling layer, which may be missing, is no larger than what is there
        raise ValueError(f"the sizes of its config need {wanted:,} values, its weights hold {held:,}")


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each weight, from the files' headers. ValueError for pickled, missing and damaged files."""
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        if (index := read_json(folder / INDEX)) is None:
            raise ValueError(f"hf:{folder}: {_without_safetensors(folder)}")
        table = index.get("weight_map")
        files = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
        if not files or any(Path(name).name != name for name in files):
            raise ValueError(f"hf:{folder}: {INDEX} names no files of the folder")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files:
        try:
            with safe_open(folder / name, "pt") as opened:
                shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"hf:{folder}: {name}: damaged or missing: {error}") from error
    return shapes


def read_preprocessor(folder: Path, kind: Literal["feature_extractor", "image_processor"]) -> dict[str, Any]:
    """The settings of a folder's preprocessor, as transformers looks for them: inside processor_config.json,
    which holds all of them since 5.0, then in preprocessor_config.json. Empty: there are none."""
    nested = (read_json(folder / "processor_config.json") or {}).get(kind)
    if isinstance(nested, dict):
        return nested
    return read_json(folder / PREPROCESSOR) or {}


def read_json(file: Path) -> dict[str, Any] | None:
    """None where there is no such file. ValueError for what is no JSON object."""
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"hf:{file.parent}: {file.name}: no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"hf:{file.parent}: {file.name} must hold an object, got {type(values).__name__}")
    return values


def sides(value: Any, name: str) -> tuple[int, int]:
    """Height and width of a size as configs and preprocessors write it: a number, a pair or an object."""
    if isinstance(value, dict):
        square = value.get("shortest_edge", value.get("longest_edge"))
        value = (value.get("height", square), value.get("width", square))
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a height and a width, got {value!r}")
    return _whole(pair[0], name), _whole(pair[1], name)


def check_picture(height: int, width: int, patch: int) -> None:
    """ValueError for a picture no one means."""
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"a picture's side must be at most {MAX_SIDE:,} pixels, got {max(height, width):,}")
    if (patches := (height // patch) * (width // patch)) > MAX_PATCHES:
        raise ValueError(f"a picture must have at most {MAX_PATCHES:,} patches, got {patches:,}")


def one_line(folder: str | Path, error: Exception) -> ValueError:
    """What went wrong with a folder, said once and in a line."""
    text = " ".join(str(error).split())
    return ValueError(
        text if text.startswith("hf:") else f"hf:{folder}: {text[:500] or type(error).__name__}"
    )


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    return value


def _check_repeats(folder: Path, values: dict[str, Any], most: int) -> None:
    """ValueError for more layers than weights: even measuring a model means making layer after layer."""
    for name, value in values.items():
        if _REPEATED.search(name) and isinstance(value, (int, float)) and value > most:
            raise ValueError(f"hf:{folder}: {name} of its config is {value:,}, it holds {most:,} weights")


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """ValueError as soon as modules of more parameters are made inside the block."""
    made = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal made
        made += 1
        if made > parameters:
            raise ValueError("its config asks for many more layers than its weights hold")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _without_safetensors(folder: Path) -> str:
    pickled = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    if not pickled:
        return f"no {WEIGHTS}"
    return (
        f"{pickled[0]} is pickled, and what is pickled is never opened: where you trust it, make {WEIGHTS} "
        "of it with AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )
