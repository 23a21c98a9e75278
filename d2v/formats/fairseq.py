"""The original's pretraining checkpoints (fairseq, examples/data2vec): weights and architecture.

`state["cfg"]["model"]` becomes our `ModelConfig`. The published models use a narrow path through the
original's switches: a setting that leaves it and changes the maths is refused by name. One without effect
is named in a warning of the logger `d2v`, as are keys that the original drops itself; settings that only
concern optimisation, logging or initial values are skipped. Source: fairseq, models/data2vec2.py and
models/modalities/{base,audio,images,text,modules}.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.fronts import Front, ImageFront, TextFront, WaveformFront
from ..config.model import DecoderConfig, MaskConfig, ModelConfig, TargetConfig
from ..config.run import WaveNorm
from ..config.toml import CheckpointError
from .fairseq_config import KNOWN, MODALITIES, PRETRAINING, SWITCHES, Section, Tree, plain
from .pt_file import LazyTensor, PtFile

_CONV_LAYERS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"
"""the original's default, of Python's syntax"""

_FINE_TUNED = ("model.", "w2v_encoder.")
"""key prefixes of fine-tuned files"""

_WRITTEN = frozenset(("drop_path_rate", "checkpoint_activations"))
"""keys that the original's fine-tuning adds to the model's section"""


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
        lazy = canonical(weights, path)
        config = translate(config_tree(root, path), {key: t.size for key, t in lazy.items()}, path)
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


def canonical(weights: Mapping[str, Any], path: str | Path) -> dict[str, LazyTensor]:
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


def config_tree(root: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The config of a file as plain containers; it has a section `model`."""
    try:
        tree = plain(root.get("cfg") or {"model": root.get("args")})
    except (RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its cfg is damaged: {error!r}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise CheckpointError(f"{path}: no `model` section in its cfg: the architecture is unknown")
    return tree


def translate(
    values: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    path: str | Path,
    *,
    tuned: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> ModelConfig:
    """`ModelConfig` of a whole config tree; `shapes` of the weights give modality and vocabulary.

    tuned: the config of the fine-tuned file around it; then only what an evaluated encoder computes is
    checked. Unless `quiet`, warns of what has no effect. Raises CheckpointError naming what changes maths.
    """
    tree, pretraining = Tree(values, path, tuned), tuned is None
    model = Section(tree, ("model",))
    modality = _modality(model, shapes)
    section = Section(tree, ("model", "modalities", modality.lower()))
    absent = "decoder" not in section.values
    decoder = Section(tree, (*section.keys, "decoder"), optional=absent or not pretraining)
    encoder_only = model.get("ema_encoder_only", True)
    if pretraining and encoder_only != (modality == "TEXT"):
        raise model.error("ema_encoder_only", encoder_only, f"only {modality == 'TEXT'} for {modality}")
    try:
        _check(tree, model, section, decoder, modality, pretraining)
        config = ModelConfig(
            front=_front(modality, model, section, shapes),
            mask=_mask(model, section, pretraining),
            decoder=DecoderConfig(
                dim=decoder.get("decoder_dim", 384),
                groups=decoder.get("decoder_groups", 16),
                kernel=decoder.get("decoder_kernel", 5),
                layers=decoder.get("decoder_layers", 5),
                residual=decoder.get("decoder_residual", True),
                projection_layers=_projection_layers(decoder, modality),
                projection_ratio=decoder.get("projection_ratio", 2.0),
                input_dropout=decoder.get("input_dropout", 0.1),
                noise_std=section.get("mask_noise_std", 0.01),
            ),
            target=_targets(model, pretraining),
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
    if not quiet:
        tree.report()
    return config


def _check(
    tree: Tree, model: Section, section: Section, decoder: Section, modality: str, pretraining: bool
) -> None:
    """Refuse switches off the published path where they have an effect; note keys and sections without."""
    parts: tuple[tuple[Section, tuple[str, ...], dict[str, str]], ...] = (
        (model, ("",), _idle_drop_path(model, "depth", 8) | {"decoder_group": "a name of the optimizer's"}),
        (section, ("modality", modality), _idle_settings(modality, section)),
        (decoder, ("decoder",), {}),
    )
    for part, names, idle in parts:
        for name in names:
            part.require(SWITCHES.get(name, {}), idle)
            part.require(PRETRAINING.get(name, {}) if pretraining else {}, idle)
        written = frozenset() if pretraining or part is not model else _WRITTEN
        part.ignore_unknown(written.union(*(KNOWN[name] for name in names)))
    if modality == "AUDIO":
        _normalises(tree)
        if section.get("use_alibi_encoder", False):
            learned = {"learned_alibi_scale": True} if pretraining else {}
            heads = {"learned_alibi_scale_per_head": True, "num_alibi_heads": model.get("num_heads", 12)}
            section.require({**learned, **heads})
    if pretraining and modality != "TEXT":
        _check_loader(tree, model, section)
    elif pretraining and not section.get("prenet_depth", 4) and section.get("prenet_dropout", 0.0):
        section.ignore("prenet_dropout", "prenet_depth is 0")  # kept, but read by nothing here either
    for name, other in Section(tree, ("model", "modalities")).values.items():
        if name not in ("_name", modality.lower()) and other is not None:
            why = "another modality" if str(name).upper() in MODALITIES else "unknown to the original"
            tree.ignore(f"model.modalities.{name}", why)


def _idle_drop_path(section: Section, key: str, default: int) -> dict[str, str]:
    """Rates grow linearly over the blocks: of none neither end counts, of one the first alone."""
    depth = section.get(key, default)
    ends = {0: ("start_drop_path_rate", "end_drop_path_rate"), 1: ("end_drop_path_rate",)}.get(depth, ())
    return dict.fromkeys(ends, f"{key} is {depth}")


def _idle_settings(modality: str, section: Section) -> dict[str, str]:
    """Settings of a modality that nothing reads in a model like this, and why."""
    idle = _idle_drop_path(section, "prenet_depth", 4) | {"remove_masks": "the original never reads it"}
    if not section.get("prenet_depth", 4):
        idle["prenet_layerdrop"] = "prenet_depth is 0"
    if not section.get("use_alibi_encoder", False):
        learned = ("learned_alibi", "learned_alibi_scale_per_layer")
        idle |= dict.fromkeys(learned, "use_alibi_encoder is False")
    least, most = section.get("mask_prob_min", None), section.get("mask_prob", 0.7)
    if isinstance(least, (int, float)) and not 0 <= least < most:
        idle["mask_prob_min"] = "not between 0 and mask_prob"
    if modality != "AUDIO":
        masked = ("encoder_zero_mask", "mask_channel_prob", "add_masks")
        idle |= dict.fromkeys(masked, "the encoder reads no masked tokens")
    if modality == "IMAGE" and not section.get("transformer_decoder", False):
        idle["enc_dec_transformer"] = "transformer_decoder is False"
    if modality == "TEXT":
        chosen = ("inverse_mask", "keep_masked_pct", "mask_dropout")
        idle |= dict.fromkeys(chosen, "single tokens are not masked with it")
        idle["ema_local_encoder"] = "the teacher has blocks only"
    return idle


def _check_loader(tree: Tree, model: Section, section: Section) -> None:
    """Masks may come from the data loader: its settings must be the model's, as they are by default."""
    loader = Section(tree, ("task", "precompute_mask_config"), optional=True)
    switches = {
        "mask_prob": section.get("mask_prob", 0.7),
        "mask_prob_adjust": section.get("mask_prob_adjust", 0.0),
        "mask_length": section.get("mask_length", 5),
        "inverse_mask": section.get("inverse_mask", False),
        "clone_batch": model.get("clone_batch", 1),
        "mask_dropout": 0,
        "expand_adjacent": False,
        "non_overlapping": False,
    }
    loader.require({key: value for key, value in switches.items() if loader.raw(key, None) is not None})


def _mask(model: Section, section: Section, pretraining: bool) -> MaskConfig:
    """Fine-tuning writes its own masks over those of pretraining: what would be none is left out."""
    prob, length = section.get("mask_prob", 0.7), section.get("mask_length", 5)
    if not pretraining:
        prob, length = prob if 0 < prob < 1 else 0.7, max(1, length)
    adjust, clones = section.get("mask_prob_adjust", 0.0), model.get("clone_batch", 1)
    return MaskConfig(prob=prob, length=length, adjust=adjust, clones=clones)


def _projection_layers(decoder: Section, modality: str) -> int:
    layers: int = decoder.get("projection_layers", 1)
    if modality != "IMAGE" or layers == 1:
        return layers
    decoder.ignore("projection_layers", "Decoder2d always has 1")
    return 1


def _modality(model: Section, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The one modality whose weights the file holds; what the config says of it must not disagree."""
    held = sorted({key.split(".")[1] for key in shapes if key.startswith("modality_encoders.")})
    path = model.tree.path
    if len(held) != 1 or held[0] not in MODALITIES:
        raise CheckpointError(f"{path}: holds weights of {held}, supported is one of {MODALITIES}")
    section = Section(model.tree, ("model", "modalities", held[0].lower()))
    for part, key in ((model, "supported_modality"), (section, "type")):
        part.require_choice(key, MODALITIES, held[0], ", whose weights it holds")
    return held[0]


def _front(modality: str, model: Section, section: Section, shapes: Mapping[str, tuple[int, ...]]) -> Front:
    extra, dim = section.get("num_extra_tokens", 0), model.get("embed_dim", 768)
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
        return WaveformFront(
            conv_layers=_conv_layers(section),
            position_width=section.get("conv_pos_width", 95),
            position_groups=section.get("conv_pos_groups", 16),
            position_layers=section.get("conv_pos_depth", 5),
            alibi=section.get("use_alibi_encoder", False),
            extra_tokens=extra,
            sample_rate=_task(model.tree).get("sample_rate", 16_000),
        )
    tables = [f"modality_encoders.TEXT.local_encoder.embed_{name}.weight" for name in ("tokens", "positions")]
    if any(len(shapes.get(table, ())) != 2 for table in tables):
        raise CheckpointError(f"{section.tree.path}: missing or malformed {' or '.join(tables)}")
    vocab, positions = (shapes[table][0] for table in tables)
    return TextFront(
        vocab_size=vocab,
        max_positions=positions - (TextFront.pad_id + 1),
        dropout=section.get("dropout", 0.1),
        extra_tokens=extra,
    )


def _task(tree: Tree) -> Section:
    return Section(tree, ("task",), optional=True)


def _normalises(tree: Tree) -> bool:
    """Whether each waveform gets unit variance, as of all published models."""
    return bool(_task(tree).get("normalize", True))


def wave_norm(root: Mapping[str, Any], path: str | Path) -> WaveNorm:
    """How the waveforms of a file's model were normalised. CheckpointError."""
    values = config_tree(root, path)
    encoders = [values["model"].get(place) for place in ("w2v_args", "pretrained_model_args")]
    tuned = next((inner for inner in encoders if isinstance(inner, dict)), None)
    tree = Tree(values, path) if tuned is None else Tree(tuned, path, values)
    return "fairseq" if _normalises(tree) else "none"


def _targets(model: Section, pretraining: bool) -> TargetConfig:
    def one(kinds: dict[str, str]) -> Any:
        chosen = [kind for key, kind in kinds.items() if model.get(key, False)]
        if len(chosen) > 1 and pretraining:
            raise model.error(" and ".join(kinds), True, "at most one of them")
        return chosen[0] if chosen else None

    depth, top_k = model.get("depth", 8), model.get("average_top_k_layers", 8)
    averaged = len(range(depth)[-top_k:])
    if averaged != top_k:
        model.ignore("average_top_k_layers", f"depth is {depth}: {averaged} layers are averaged")
    return TargetConfig(
        top_k=averaged,
        norm=one({f"{kind}_norm_target_layer": kind for kind in ("instance", "layer", "batch")}),
        final=one({f"{kind}_norm_targets": kind for kind in ("layer", "instance")}),
    )


def _conv_layers(section: Section) -> tuple[tuple[int, int, int], ...]:
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
