"""The original's pretraining checkpoints (fairseq, examples/data2vec): weights and architecture.

`state["cfg"]["model"]` becomes our `ModelConfig`. The published models use a narrow path through the
original's switches; a setting that leaves it is refused by name instead of being ignored, settings
that only concern optimisation, logging or initial values are skipped. Source: fairseq,
models/data2vec2.py and models/modalities/{base,audio,images,text}.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import CheckpointError
from .config import (
    DecoderConfig,
    Front,
    ImageFront,
    MaskConfig,
    ModelConfig,
    TargetConfig,
    TextFront,
    WaveformFront,
)
from .pt_file import Inert, LazyTensor, PtFile

_CONV_LAYERS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"
"""the original's default, of Python's syntax"""

_MODALITIES = ("AUDIO", "IMAGE", "TEXT")
"""in the order of the original's enum, which counts from 1"""

_FINE_TUNED = ("model.", "w2v_encoder.")
"""key prefixes of fine-tuned files"""

_PUBLISHED: dict[str, dict[str, Any]] = {
    "": {
        "layer_norm_first": False, "end_of_block_targets": False, "norm_affine": True, "dropout_input": 0,
        "start_drop_path_rate": 0, "end_drop_path_rate": 0, "shared_decoder": None, "recon_loss": 0,
        "d2v_loss": 1, "decoder_group": False,
    },
    "modality": {
        "prenet_layerdrop": 0, "start_drop_path_rate": 0, "end_drop_path_rate": 0, "mask_prob_min": None,
        "keep_masked_pct": 0, "add_masks": False, "remove_masks": False, "mask_dropout": 0,
        "encoder_zero_mask": True, "mask_channel_prob": 0, "learned_alibi": False,
        "learned_alibi_scale_per_layer": False,
    },
    "IMAGE": {
        "inverse_mask": True, "ema_local_encoder": True, "use_alibi_encoder": False, "fixed_positions": True,
        "transformer_decoder": False, "enc_dec_transformer": False,
    },
    "AUDIO": {
        "inverse_mask": False, "ema_local_encoder": False, "extractor_mode": "layer_norm",
        "conv_pos_pre_ln": False,
    },
    "TEXT": {
        "inverse_mask": False, "use_alibi_encoder": False, "learned_pos": True, "no_scale_embedding": True,
        "layernorm_embedding": True, "no_token_positional_embeddings": False, "mask_length": 1,
    },
    "decoder": {"add_positions_masked": False, "add_positions_all": False},
}  # fmt: skip
"""the only accepted value of each switch, by section; what a file leaves out has its default, which
is the accepted one except where `_DEFAULTS` says otherwise"""

_DEFAULTS: dict[str, Any] = {
    "inverse_mask": False, "ema_local_encoder": False, "mask_length": 5, "use_alibi_encoder": False,
}  # fmt: skip


def load_original(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Architecture and weights of a pretraining `.pt` file: student keys, then `_ema.<key>` (teacher).

    Tensors keep the file's dtype (fp16 runs save an fp16 student and an fp32 teacher). Only the
    model's tensors are read. Raises `CheckpointError` naming the file and what is wrong with it.
    """
    with PtFile(path) as file:
        root = file.root
        weights = root.get("model") if isinstance(root, dict) else None
        if not isinstance(weights, dict):
            raise CheckpointError(f"{path}: no `model` in it: not a checkpoint of the original")
        if prefixes := _fine_tuned_prefixes(weights):
            raise CheckpointError(
                f"{path}: fine-tuned checkpoint (its keys start with `{prefixes[0]}`); "
                "only pretraining checkpoints can be loaded"
            )
        lazy = _canonical(weights, path)
        config = translate(_config_tree(root, path), {key: t.size for key, t in lazy.items()}, path)
        if not any(key.startswith("_ema.") for key in lazy):
            raise CheckpointError(f"{path}: no `_ema` in its model: the teacher was not saved")
        return config, {key: file.tensor(tensor) for key, tensor in lazy.items()}


def is_finetuned(path: str | Path) -> bool:
    """Whether a `.pt` file holds a fine-tuned model. Raises CheckpointError for what is no such file."""
    with PtFile(path) as file:
        weights = file.root.get("model") if isinstance(file.root, dict) else None
        return isinstance(weights, dict) and bool(_fine_tuned_prefixes(weights))


def _fine_tuned_prefixes(weights: Mapping[str, Any]) -> list[str]:
    return [prefix for prefix in _FINE_TUNED if any(str(key).startswith(prefix) for key in weights)]


def _canonical(weights: Mapping[str, Any], path: str | Path) -> dict[str, LazyTensor]:
    """Today's key names and shapes; older files have other ones, which the original renames on load."""
    flat = {key: value for key, value in weights.items() if key != "_ema"}
    teacher = weights.get("_ema") or {}
    flat.update({f"_ema.{key}": value for key, value in teacher.items()})
    out: dict[str, LazyTensor] = {}
    for key, value in flat.items():
        if not isinstance(value, LazyTensor):
            raise CheckpointError(f"{path}: {key} must be a tensor, got {value!r}")
        if key.endswith((".encoder_mask", "IMAGE.alibi_bias")):
            continue
        name = re.sub(
            r"(?<=\.)positional_encoder\.(pos_embed|positions)$", "fixed_positional_encoder.positions", key
        )
        if name.endswith(".alibi_scale") and len(value.size) == 4:
            value = LazyTensor(value.storage, value.offset, (1, *value.size), (0, *value.stride))
        out[name] = value
    return out


def _config_tree(root: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    try:
        tree = _plain(root.get("cfg") or {"model": root.get("args")})
    except (RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its cfg is damaged: {error!r}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise CheckpointError(f"{path}: no `model` section in its cfg: the architecture is unknown")
    return tree


def _plain(value: Any) -> Any:
    """OmegaConf's containers and nodes, or a Namespace, as plain containers; interpolations stay."""
    if isinstance(value, Inert) and isinstance(value.state, dict):
        if value.name == "argparse.Namespace":
            return _plain(value.state)
        if value.name.startswith("omegaconf."):
            return _plain(value.state["_content" if "_content" in value.state else "_val"])
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class _Section:
    """One mapping of the config, read with checks; errors name the full key and the value."""

    def __init__(self, tree: dict[str, Any], keys: tuple[str, ...], path: str | Path) -> None:
        self.tree, self.keys, self.path = tree, keys, path
        values: Any = tree
        for key in keys:
            values = self._resolve(values.get(key)) if isinstance(values, dict) else None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: no section {'.'.join(keys)} in its cfg")
        self.values = values

    def _resolve(self, value: Any) -> Any:
        """Follow `${a.b}` (from the root, as in the original's configs) to a value."""
        for _ in range(16):
            found = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
            if not found:
                return value
            target: Any = self.tree
            for key in found[1].split("."):
                if not isinstance(target, dict) or key not in target:
                    raise CheckpointError(f"{self.path}: {value} in its cfg leads nowhere")
                target = target[key]
            value = target
        raise CheckpointError(f"{self.path}: {value} in its cfg leads in a circle")

    def get(self, key: str, default: Any) -> Any:
        """The value of `key`, in the type of `default` (numbers and strings are converted)."""
        value = self._resolve(self.values.get(key, default))
        if value == "???":  # OmegaConf's mark of a missing value
            value = default
        if value is None or default is None or isinstance(value, type(default)):
            return value
        try:
            if isinstance(default, float) and not isinstance(value, bool):
                return float(value)
            if isinstance(default, int) and int(value) == float(value):
                return int(value)
        except (TypeError, ValueError, OverflowError):
            pass
        raise self.error(key, value, f"a {type(default).__name__}")

    def error(self, key: str, value: Any, contract: str) -> CheckpointError:
        name = ".".join((*self.keys, key))
        return CheckpointError(f"{self.path}: {name} is {value!r}, supported is {contract}")

    def require(self, published: Mapping[str, Any]) -> None:
        for key, accepted in published.items():
            value = self._resolve(self.values.get(key, _DEFAULTS.get(key, accepted)))
            if value != accepted:
                raise self.error(key, value, f"only {accepted!r}")


def translate(tree: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], path: str | Path) -> ModelConfig:
    """`ModelConfig` of a whole config tree; `shapes` of the weights give modality and vocabulary."""
    model = _Section(tree, ("model",), path)
    model.require(_PUBLISHED[""])
    modality = _modality(model, shapes)
    section = _Section(tree, ("model", "modalities", modality.lower()), path)
    section.require({**_PUBLISHED["modality"], **_PUBLISHED[modality]})
    decoder = _Section(tree, (*section.keys, "decoder"), path)
    decoder.require(_PUBLISHED["decoder"])
    encoder_only = model.get("ema_encoder_only", True)
    if encoder_only != (modality == "TEXT"):
        raise model.error("ema_encoder_only", encoder_only, f"only {modality == 'TEXT'} for {modality}")
    try:
        return ModelConfig(
            front=_front(modality, model, section, shapes),
            mask=MaskConfig(
                prob=section.get("mask_prob", 0.7),
                length=section.get("mask_length", 5),
                adjust=section.get("mask_prob_adjust", 0.0),
                clones=model.get("clone_batch", 1),
            ),
            decoder=DecoderConfig(
                dim=decoder.get("decoder_dim", 384),
                groups=decoder.get("decoder_groups", 16),
                kernel=decoder.get("decoder_kernel", 5),
                layers=decoder.get("decoder_layers", 5),
                residual=decoder.get("decoder_residual", True),
                projection_layers=decoder.get("projection_layers", 1),
                projection_ratio=decoder.get("projection_ratio", 2.0),
                input_dropout=decoder.get("input_dropout", 0.1),
                noise_std=section.get("mask_noise_std", 0.01),
            ),
            target=_targets(model),
            dim=model.get("embed_dim", 768),
            heads=model.get("num_heads", 12),
            prenet_depth=section.get("prenet_depth", 4),
            depth=model.get("depth", 8),
            mlp_ratio=model.get("mlp_ratio", 4.0),
            norm_eps=model.get("norm_eps", 1e-6),
            prenet_dropout=section.get("prenet_dropout", 0.0),
            encoder_dropout=model.get("encoder_dropout", 0.1),
            attention_dropout=model.get("attention_dropout", 0.1),
            activation_dropout=model.get("activation_dropout", 0.0),
            post_mlp_dropout=model.get("post_mlp_drop", 0.1),
            layerdrop=model.get("layerdrop", 0.0),
            loss_beta=model.get("loss_beta", 0.0),
            loss_scale=None if model.get("loss_scale", None) is None else model.get("loss_scale", 1.0),
            cls_loss=model.get("cls_loss", 0.0),
            ema_encoder_only=encoder_only,
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: its cfg makes no model: {error}") from error


def _modality(model: _Section, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The one modality whose weights the file holds; `supported_modality` must not disagree."""
    held = sorted({key.split(".")[1] for key in shapes if key.startswith("modality_encoders.")})
    if len(held) != 1 or held[0] not in _MODALITIES:
        raise CheckpointError(f"{model.path}: holds weights of {held}, supported is one of {_MODALITIES}")
    stated = model.get("supported_modality", None)
    name = stated
    if isinstance(stated, Inert) and stated.args:  # an enum: by value, or by name
        name = stated.args[0]
    if isinstance(name, int) and 1 <= name <= len(_MODALITIES):
        name = _MODALITIES[name - 1]
    if name is not None and str(name).rsplit(".", 1)[-1].upper() != held[0]:
        raise model.error("supported_modality", stated, f"{held[0]}, whose weights it holds")
    return held[0]


def _front(modality: str, model: _Section, section: _Section, shapes: Mapping[str, tuple[int, ...]]) -> Front:
    extra = section.get("num_extra_tokens", 0)
    dim, heads = model.get("embed_dim", 768), model.get("num_heads", 12)
    if modality == "IMAGE":
        if section.get("embed_dim", 768) != dim:
            raise section.error("embed_dim", section.get("embed_dim", 768), f"only {dim}, as model.embed_dim")
        side = section.get("input_size", 224)
        return ImageFront(
            height=side,
            width=side,
            patch=section.get("patch_size", 16),
            channels=section.get("in_chans", 3),
            extra_tokens=extra,
        )
    if modality == "AUDIO":
        alibi = section.get("use_alibi_encoder", False)
        if alibi:
            learned = {"learned_alibi_scale": True, "learned_alibi_scale_per_head": True}
            section.require({**learned, "num_alibi_heads": heads})
        return WaveformFront(
            conv_layers=_conv_layers(section),
            position_width=section.get("conv_pos_width", 95),
            position_groups=section.get("conv_pos_groups", 16),
            position_layers=section.get("conv_pos_depth", 5),
            alibi=alibi,
            extra_tokens=extra,
        )
    tables = [f"modality_encoders.TEXT.local_encoder.embed_{name}.weight" for name in ("tokens", "positions")]
    if any(len(shapes.get(table, ())) != 2 for table in tables):
        raise CheckpointError(f"{section.path}: missing or malformed {' or '.join(tables)}")
    vocab, positions = (shapes[table][0] for table in tables)
    return TextFront(
        vocab_size=vocab,
        max_positions=positions - (TextFront.pad_id + 1),
        dropout=section.get("dropout", 0.1),
        extra_tokens=extra,
    )


def _targets(model: _Section) -> TargetConfig:
    def one(kinds: dict[str, str]) -> Any:
        chosen = [kind for key, kind in kinds.items() if model.get(key, False)]
        if len(chosen) > 1:
            raise model.error(" and ".join(kinds), True, "at most one of them")
        return chosen[0] if chosen else None

    return TargetConfig(
        top_k=model.get("average_top_k_layers", 8),
        norm=one({f"{kind}_norm_target_layer": kind for kind in ("instance", "layer", "batch")}),
        final=one({f"{kind}_norm_targets": kind for kind in ("layer", "instance")}),
    )


def _conv_layers(section: _Section) -> tuple[tuple[int, int, int], ...]:
    """`"[(512, 10, 5)] + [(512, 3, 2)] * 4"` without eval: lists of triples, `+` and `* count` only."""
    spec = section.get("feature_encoder_spec", _CONV_LAYERS)

    def layers(node: ast.expr) -> list[Any]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return layers(node.left) + layers(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            count = ast.literal_eval(node.right)
            if not isinstance(count, int) or not 0 <= count <= 100:
                raise ValueError("repeat")
            return layers(node.left) * count
        value = ast.literal_eval(node)
        triples = isinstance(value, list) and all(
            isinstance(layer, tuple) and len(layer) == 3 and all(type(n) is int and n > 0 for n in layer)
            for layer in value
        )
        if not triples:
            raise ValueError("triples")
        return value

    try:
        return tuple(layers(ast.parse(spec, mode="eval").body))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise section.error("feature_encoder_spec", spec, f'like "{_CONV_LAYERS}"') from error
