"""The original's config of a model, `state["cfg"]["model"]`, as our `ModelConfig` and back.

The published models use a narrow path through the original's switches: a setting that leaves it and changes
the maths is refused by name. One without effect is named in a warning of the logger `d2v`, as are keys that
the original drops itself; settings that only concern optimisation, logging or initial values are skipped.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..config.fronts import Front, ImageFront, LogMelFront, TextFront, WaveformFront
from ..config.model import DecoderConfig, MaskConfig, ModelConfig, TargetConfig
from ..config.run import WaveNorm
from ..config.toml import CheckpointError, flatten, to_dict
from .fairseq_names import CONV_LAYERS, FIELDS, KNOWN, MODALITIES, NORMS, PRETRAINING, REPEATED, SWITCHES
from .fairseq_tree import Section, Tree

_FRONTS: dict[str, type] = {"IMAGE": ImageFront, "AUDIO": WaveformFront, "TEXT": TextFront}

_WRITTEN = frozenset(("drop_path_rate", "checkpoint_activations"))
"""keys that the original's fine-tuning adds to the model's section"""


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
    model = Section(tree, ("model",), "")
    modality = _modality(model, shapes)
    section = Section(tree, ("model", "modalities", modality.lower()), "modality", modality)
    absent = "decoder" not in section.values
    decoder = Section(tree, (*section.keys, "decoder"), "decoder", optional=absent or not pretraining)
    encoder_only = model.get("ema_encoder_only")
    if pretraining and encoder_only != (modality == "TEXT"):
        raise model.error("ema_encoder_only", encoder_only, f"only {modality == 'TEXT'} for {modality}")
    sections = {"": model, "modality": section, modality: section, "decoder": decoder}
    if modality == "AUDIO":
        sections["task"] = task_of(tree)
    try:
        _check(tree, sections, modality, pretraining)
        fields = {
            ours: place.get(key)
            for name, place in sections.items()
            for key, (ours, _) in FIELDS[name].items()
        }
        fields |= {key: _norm(model, *switches, pretraining) for key, switches in NORMS.items()}
        _complete_front(fields, modality, section, shapes, pretraining)
        _complete_depths(fields, model, decoder if modality == "IMAGE" else None)
        if not pretraining:  # fine-tuning writes its own masks over these: what would be none is left out
            if not 0 < fields["mask.prob"] < 1:
                fields["mask.prob"] = 0.7
            fields["mask.length"] = max(1, fields["mask.length"])
        config = _made(fields, _FRONTS[modality])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: its cfg makes no model: {error}") from error
    if not quiet:
        tree.report()
    return config


def original_config(cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The original's `cfg.model` for a `ModelConfig`: the inverse of `translate`.

    shapes: of the weights. ValueError for what is lost on the way there and back.
    """
    front, modality = cfg.front, cfg.modality.upper()
    if isinstance(front, LogMelFront):
        raise ValueError("convert: the original has no log-mel front end")
    if cfg.objective != "data2vec2":
        raise ValueError(f"convert: the original is for data2vec2, got objective {cfg.objective}")

    def written(*sections: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in sections:
            ours = {key: field for key, (field, _) in FIELDS[name].items()} | REPEATED.get(name, {})
            values |= {key: attrgetter(field)(cfg) for key, field in ours.items()}
            values |= SWITCHES.get(name, {}) | PRETRAINING.get(name, {})
        return values

    section = {**written("modality", modality), "decoder": written("decoder")}
    if isinstance(front, WaveformFront):
        section["feature_encoder_spec"] = str(list(front.conv_layers))
    tree = {
        "_name": "data2vec_multi",
        "supported_modality": modality,
        **written(""),
        **{
            switch.format(kind): attrgetter(key)(cfg) == kind
            for key, (switch, kinds) in NORMS.items()
            for kind in kinds
        },
        "modalities": {cfg.modality: section},
    }
    back = translate({"model": tree, **original_task(front)}, shapes, "convert", quiet=True)
    # what the original does not have: the rows a CLS loss is scaled to, and the deviation of initial weights
    wanted = flatten(to_dict(replace(cfg, cls_rows=None, init_std=back.init_std)))
    found = flatten(to_dict(back))
    if lost := sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)):
        listed = ", ".join(f"{key} = {wanted.get(key)!r}" for key in lost)
        raise ValueError(f"convert: the original cannot express {listed}")
    return tree


def task_of(tree: Tree) -> Section:
    """What `cfg.task` says of how speech is read."""
    return Section(tree, ("task",), "task", optional=True)


def normalises(tree: Tree) -> bool:
    """Whether each waveform gets unit variance, as of all published models."""
    return bool(task_of(tree).get("normalize"))


def original_task(front: Front, waves: WaveNorm | None = None) -> dict[str, Any]:
    """The original's `cfg` of what `task_of` and `normalises` read: of speech alone."""
    if not isinstance(front, WaveformFront):
        return {}
    read = {"sample_rate": front.sample_rate, "normalize": waves != "none"}
    return {"task": {"_name": "audio_pretraining", **read}}


def _made(fields: Mapping[str, Any], front: type) -> ModelConfig:
    """A config of dotted keys. ValueError and TypeError as its classes raise them."""
    parts: dict[str, dict[str, Any]] = {"": {}, "front": {}, "mask": {}, "decoder": {}, "target": {}}
    for name, value in fields.items():
        part, _, key = name.rpartition(".")
        parts[part][key] = value
    return ModelConfig(
        front=front(**parts["front"]),
        mask=MaskConfig(**parts["mask"]),
        decoder=DecoderConfig(**parts["decoder"]),
        target=TargetConfig(**parts["target"]),
        **parts[""],
    )


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


def _norm(model: Section, switch: str, kinds: tuple[str, ...], pretraining: bool) -> str | None:
    keys = {switch.format(kind): kind for kind in kinds}
    chosen = [kind for key, kind in keys.items() if model.get(key)]
    if len(chosen) > 1 and pretraining:
        raise model.error(" and ".join(keys), True, "at most one of them")
    return chosen[0] if chosen else None


def _complete_front(
    fields: dict[str, Any],
    modality: str,
    section: Section,
    shapes: Mapping[str, tuple[int, ...]],
    pretraining: bool,
) -> None:
    """What is no number of the config's, and what stands in it twice."""
    if modality == "TEXT":
        tables = [
            f"modality_encoders.TEXT.local_encoder.embed_{kind}.weight" for kind in ("tokens", "positions")
        ]
        if any(len(shapes.get(table, ())) != 2 for table in tables):
            raise CheckpointError(f"{section.tree.path}: missing or malformed {' or '.join(tables)}")
        fields["front.vocab_size"], positions = (shapes[table][0] for table in tables)
        fields["front.max_positions"] = positions - (TextFront.pad_id + 1)
        return
    if modality == "IMAGE":
        fields["front.width"] = fields["front.height"]
    else:
        fields["front.conv_layers"] = _conv_layers(section, fields["front.conv_layers"])
    if modality == "IMAGE" or fields["front.alibi"]:
        repeated = {key: fields[ours] for key, ours in REPEATED[modality].items()}
        if not pretraining:
            repeated.pop("learned_alibi_scale", None)
        section.require(repeated)


def _complete_depths(fields: dict[str, Any], model: Section, decoder_2d: Section | None) -> None:
    """Layers that the original counts otherwise than its config says."""
    depth, top_k = fields["depth"], fields["target.top_k"]
    fields["target.top_k"] = averaged = len(range(depth)[-top_k:])
    if averaged != top_k:
        model.ignore("average_top_k_layers", f"depth is {depth}: {averaged} layers are averaged")
    if decoder_2d is not None and fields["decoder.projection_layers"] != 1:
        decoder_2d.ignore("projection_layers", "Decoder2d always has 1")
        fields["decoder.projection_layers"] = 1


def _check(tree: Tree, sections: Mapping[str, Section], modality: str, pretraining: bool) -> None:
    """Refuse switches off the published path where they have an effect; note keys and sections without."""
    model, section, decoder = sections[""], sections["modality"], sections["decoder"]
    parts: tuple[tuple[Section, tuple[str, ...], dict[str, str]], ...] = (
        (model, ("",), _idle_drop_path(model, "depth") | {"decoder_group": "a name of the optimizer's"}),
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
        normalises(tree)
    if pretraining and modality != "TEXT":
        _check_loader(tree, model, section)
    elif pretraining and not section.get("prenet_depth") and section.get("prenet_dropout"):
        section.ignore("prenet_dropout", "prenet_depth is 0")  # kept, but read by nothing here either
    for name, other in Section(tree, ("model", "modalities")).values.items():
        if name not in ("_name", modality.lower()) and other is not None:
            why = "another modality" if str(name).upper() in MODALITIES else "unknown to the original"
            tree.ignore(f"model.modalities.{name}", why)


def _idle_drop_path(section: Section, key: str) -> dict[str, str]:
    """Rates grow linearly over the blocks: of none neither end counts, of one the first alone."""
    depth = section.get(key)
    ends = {0: ("start_drop_path_rate", "end_drop_path_rate"), 1: ("end_drop_path_rate",)}.get(depth, ())
    return dict.fromkeys(ends, f"{key} is {depth}")


def _idle_settings(modality: str, section: Section) -> dict[str, str]:
    """Settings of a modality that nothing reads in a model like this, and why."""
    idle = _idle_drop_path(section, "prenet_depth") | {"remove_masks": "the original never reads it"}
    if not section.get("prenet_depth"):
        idle["prenet_layerdrop"] = "prenet_depth is 0"
    if not section.get("use_alibi_encoder"):
        learned = ("learned_alibi", "learned_alibi_scale_per_layer")
        idle |= dict.fromkeys(learned, "use_alibi_encoder is False")
    least, most = section.raw("mask_prob_min"), section.get("mask_prob")
    if isinstance(least, (int, float)) and not 0 <= least < most:
        idle["mask_prob_min"] = "not between 0 and mask_prob"
    if modality != "AUDIO":
        masked = ("encoder_zero_mask", "mask_channel_prob", "add_masks")
        idle |= dict.fromkeys(masked, "the encoder reads no masked tokens")
    if modality == "IMAGE" and not section.raw("transformer_decoder"):
        idle["enc_dec_transformer"] = "transformer_decoder is False"
    if modality == "TEXT":
        chosen = ("inverse_mask", "keep_masked_pct", "mask_dropout")
        idle |= dict.fromkeys(chosen, "single tokens are not masked with it")
        idle["ema_local_encoder"] = "the teacher has blocks only"
    return idle


def _check_loader(tree: Tree, model: Section, section: Section) -> None:
    """Masks may come from the data loader: its settings must be the model's, as they are by default."""
    loader = Section(tree, ("task", "precompute_mask_config"), optional=True)
    names = ("mask_prob", "mask_prob_adjust", "mask_length", "inverse_mask")
    switches = {key: section.get(key) for key in names} | {"clone_batch": model.get("clone_batch")}
    switches |= {"mask_dropout": 0, "expand_adjacent": False, "non_overlapping": False}
    loader.require({key: value for key, value in switches.items() if loader.raw(key) is not None})


def _conv_layers(section: Section, spec: str) -> tuple[tuple[int, int, int], ...]:
    """`"[(512, 10, 5)] + [(512, 3, 2)] * 4"` without eval: lists of triples, `+` and `* count` only."""

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
        raise section.error("feature_encoder_spec", spec, f'like "{CONV_LAYERS}"') from error
