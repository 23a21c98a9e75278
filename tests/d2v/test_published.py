"""Every value of every preset against the published config it stands for, as fairseq completes it.

`complaints` reads a published config key by key and says what each of our values must be, without
`d2v.formats.fairseq_config.translate`, which has a test of its own here. Nothing is left over on either side:
a published key is compared or set aside with a reason, and so is each of ours.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from d2v.config.presets import PRESETS, preset
from d2v.config.run import Config
from d2v.formats.fairseq_config import translate

PUBLISHED = {
    **{name: name for name in ("image_base", "image_large", "image_huge14", "audio_base", "audio_large",
                               "text_base", "text_large")},
    "text_large_1m": "text_large_pgrp_1M",
}  # fmt: skip
"""preset -> published config"""

DIFFERENT: dict[str, tuple[Any, str]] = {
    "train.precision": ("bf16", "fp16 there, with loss scaling; bf16 has fp32's range and needs none"),
    "train.alarm_after": (5_000, "a run of theirs ends at a low min_target_var or min_pred_var, from then on"
                                 " (data2vec2.py); here an alarm is logged, by measures of our own"),
}  # fmt: skip
"""our key -> value, and why it is not the published one"""

IN_THE_CODE: dict[str, tuple[Any, str]] = {
    "model.objective": ("data2vec2", "models/data2vec2.py"),
    "model.mask.kind": (None, "the modality's own: goldens/mask_stats.json"),
    "model.init_std": (0.02, "init_bert_params"),
    "model.front.pad_id": (1, "fairseq/data/dictionary.py: <s> <pad> </s> <unk>"),
    "model.front.vocab_size": (50_265, "GPT-2's dict.txt, four specials, padding to a multiple of 8, <mask>"),
    "optim.eps_mode": ("fairseq", "fairseq/optim/adam.py"),
    "optim.decay_all": (True, "fairseq/optim/composite.py ignores the overrides, adam.py knows none"),
    "optim.schedule": ("cosine", "its name is compared too"),
    "data.crop_scale": ((0.2, 1.0), "data/mae_image_dataset.py, RandomResizedCrop"),
    "data.flip": (True, "data/mae_image_dataset.py, RandomHorizontalFlip"),
    "data.mean": (None, "ImageNet's, data/mae_image_dataset.py"),
    "data.std": (None, "ImageNet's, data/mae_image_dataset.py"),
}  # fmt: skip
"""our key -> value that the original does not read from a config, and where it comes from"""

OURS = {
    "preset": "our name",
    "model.mae.*": "of another objective",
    "model.front.mask_id": "of other objectives",
    "optim.stages": "of another schedule",
    "optim.end_scale": "of another schedule",
    "optim.power": "of another schedule",
    "data.workers": "speed", "data.prefetch": "speed", "data.max_pixels": "safety",
    "data.max_unreadable": "files", "data.text_column": "files", "data.label_column": "files",
    "data.audio_column": "files",
    "data.channels": "mix: as there, raw_audio_dataset.py, postprocess",
    "data.tokenizer": "a path", "data.bucket_seconds": "0: as there, any length",
    "data.shuffle_window": "0: as there, the whole data set",
    "train.backend": "speed", "train.device": "speed", "train.compile": "speed", "train.cuda_graph": "speed",
    "train.micro_batch": "memory",
    "train.save_every": "files", "train.keep": "files", "train.log_every": "files",
    "train.max_bad_steps": "a limit of ours", "train.min_rank": "an alarm", "train.min_variance": "an alarm",
    "probe.*": "measures while training",
}  # fmt: skip
"""our keys without counterpart, and why they do not matter"""

SET_ASIDE = {
    "yaml": "a file name", "model._name": "a name", "*.type": "a name",
    "criterion.*": "a sum, and what is logged",
    "task._name": "what the loader reads: data of the modality",
    "optimizer._name": "what it holds is compared",
    "model.modalities.audio.init_extra_token_zero": "there are none",
    "model.modalities.text.init_extra_token_zero": "there are none",
    "model_as_written.*": "as it stood in the file, before fairseq completed it",
    "keys_the_code_does_not_know": "dropped by the original",
    "model.min_target_var": "see train.alarm_after", "model.min_pred_var": "see train.alarm_after",
    "model.max_update": "optimization.max_update again",
    "model.modalities.*.model_depth": "of learned ALiBi by layer",
    "model.log_norms": "what is logged", "model.ema_same_dtype": "precision",
    "model.skip_ema": "of fine-tuning",
    "model.modalities._name": "a name",
    "model.modalities.*.mask_channel_length": "mask_channel_prob is 0",
    "model.modalities.*.alibi_max_pos": "of learned ALiBi",
    "model.modalities.image.alibi_d*": "pictures have no ALiBi",
    "model.decoder_group": "what groups hold is compared, and they agree",
    "optimizer.dynamic_groups": "what groups hold is compared, and they agree",
    "optimizer.groups.*.optimizer._name": "adam, what it holds is compared",
    "optimizer.*tpu": "speed", "optimizer.use_old_adam": "speed", "optimizer.fp16_adam_stats": "precision",
    "lr_scheduler.t_mult": "one period", "lr_scheduler.lr_period_updates": "one period",
    "lr_scheduler.lr_shrink": "one period",
    "lr_scheduler.max_update": "optimization.max_update again",
    "task.local_cache_path": "a path", "task.key": "a name", "task.post_save_script": "a path",
    "task.rebuild_batches": "speed", "task.tpu": "speed", "task.num_batch_buckets": "0: any length",
    "task.labels": "none", "task.multi_corpus_*": "none", "task.binarized_dataset": "a file format",
    "task.text_compression_level": "a file format", "task.seed": "train.seed is compared with model.seed",
    "task.include_*": "what a batch holds", "task.d2v2_multi": "what a batch holds",
    "task.shorten_*": "blocks are never longer",
    "task.mask_*": "task.skip_masking: the model masks", "task.leave_unmasked_prob": "task.skip_masking",
    "task.random_token_prob": "task.skip_masking", "task.freq_weighted_replacement": "task.skip_masking",
    "dataset.num_workers": "speed", "dataset.disable_validation": "there is none here",
    "dataset.validate_interval": "there is none here", "dataset.ignore_unused_valid_subsets": "likewise",
    "dataset.skip_invalid_size_inputs_valid_test": "likewise",
    "dataset.required_batch_size_multiple": "1: any",
}  # fmt: skip
"""pattern of published keys that do not concern us, and why"""

SWITCHES: dict[str, Any] = {
    "start_drop_path_rate": 0, "end_drop_path_rate": 0, "norm_affine": True, "dropout_input": 0,
    "layer_norm_first": False, "end_of_block_targets": False, "shared_decoder": None, "mae_init": False,
    "recon_loss": 0, "d2v_loss": 1,
}  # fmt: skip
"""of the model: the one value that our model has"""

MODALITY_SWITCHES: dict[str, Any] = {
    "start_drop_path_rate": 0, "end_drop_path_rate": 0, "mask_prob_min": None, "keep_masked_pct": 0,
    "add_masks": False, "remove_masks": False, "mask_dropout": 0, "encoder_zero_mask": True,
    "mask_channel_prob": 0, "local_grad_mult": 1, "alibi_scale": 1, "learned_alibi": False,
    "learned_alibi_scale_per_layer": False, "decoder.add_positions_masked": False,
    "decoder.add_positions_all": False,
}  # fmt: skip

OWN_SWITCHES: dict[str, dict[str, Any]] = {
    "image": {"inverse_mask": True, "ema_local_encoder": True, "use_alibi_encoder": False,
              "learned_alibi_scale": False, "learned_alibi_scale_per_head": False, "fixed_positions": True,
              "init_extra_token_zero": False, "transformer_decoder": False, "enc_dec_transformer": False},
    "audio": {"inverse_mask": False, "ema_local_encoder": False, "learned_alibi_scale": True,
              "learned_alibi_scale_per_head": True, "extractor_mode": "layer_norm", "conv_pos_pre_ln": False},
    "text": {"inverse_mask": False, "ema_local_encoder": False, "use_alibi_encoder": False,
             "learned_alibi_scale": False, "learned_alibi_scale_per_head": False, "learned_pos": True,
             "no_scale_embedding": True, "layernorm_embedding": True,
             "no_token_positional_embeddings": False},
}  # fmt: skip

TASK_SWITCHES: dict[str, dict[str, Any]] = {
    "image": {},
    "audio": {"subsample": 1, "precompute_mask_config.inverse_mask": False,
              "precompute_mask_config.mask_dropout": 0, "precompute_mask_config.expand_adjacent": False,
              "precompute_mask_config.non_overlapping": False},
    "text": {"sample_break_mode": "none", "skip_masking": True},
}  # fmt: skip

CONV_LAYERS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"


class Reader:
    """A published config, and what was read of it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.read: set[str] = set()
        self.wrong: list[str] = []

    def __call__(self, key: str) -> Any:
        self.read.add(key)
        return self.values[key]

    def has(self, key: str) -> bool:
        return key in self.values

    def same(self, key: str, value: Any) -> None:
        """The published value must be this one."""
        if (found := self(key)) != value:
            self.wrong.append(f"published {key} is {found!r}, ours stands for {value!r}")


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings and dataclasses; a front end also by its class."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        if prefix == "model.front.":
            yield "model.front", type(tree).__name__
        tree = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    for name, value in tree.items():
        if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def wanted(p: Reader) -> dict[str, Any]:
    """Our keys and the values that a published config gives them."""
    modality = str(p("model.supported_modality")).lower()
    model, own = "model.", f"model.modalities.{modality}."
    for prefix, switches in (
        (model, SWITCHES), (own, MODALITY_SWITCHES), (own, OWN_SWITCHES[modality]),
        ("task.", TASK_SWITCHES[modality]),
    ):  # fmt: skip
        for name, value in switches.items():
            p.same(prefix + name, value)
    depth = p(own + "prenet_depth")
    if depth:  # nothing to drop otherwise
        p.same(own + "prenet_layerdrop", 0)
    else:
        p(own + "prenet_layerdrop")
    heads, clones = p(model + "num_heads"), p(model + "clone_batch")
    p.same(own + "num_alibi_heads", heads)
    samples, batch = batches(p, modality)
    cls = p(model + "cls_loss")
    names = {
        "dim": "embed_dim", "depth": "depth", "mlp_ratio": "mlp_ratio", "norm_eps": "norm_eps",
        "encoder_dropout": "encoder_dropout", "attention_dropout": "attention_dropout",
        "activation_dropout": "activation_dropout", "post_mlp_dropout": "post_mlp_drop",
        "layerdrop": "layerdrop", "loss_beta": "loss_beta", "loss_scale": "loss_scale",
        "ema_encoder_only": "ema_encoder_only", "target.top_k": "average_top_k_layers",
    }  # fmt: skip
    sections = {
        "prenet_dropout": "prenet_dropout", "mask.prob": "mask_prob", "mask.length": "mask_length",
        "mask.adjust": "mask_prob_adjust", "decoder.noise_std": "mask_noise_std",
        "decoder.dim": "decoder.decoder_dim", "decoder.groups": "decoder.decoder_groups",
        "decoder.kernel": "decoder.decoder_kernel", "decoder.layers": "decoder.decoder_layers",
        "decoder.residual": "decoder.decoder_residual", "decoder.input_dropout": "decoder.input_dropout",
        "decoder.projection_layers": "decoder.projection_layers",
        "decoder.projection_ratio": "decoder.projection_ratio", "front.extra_tokens": "num_extra_tokens",
    }  # fmt: skip
    return {
        **{f"model.{ours}": p(model + theirs) for ours, theirs in names.items()},
        **{f"model.{ours}": p(own + theirs) for ours, theirs in sections.items()},
        "model.heads": heads,
        "model.prenet_depth": depth,
        "model.mask.clones": clones,
        "model.cls_loss": cls,
        "model.cls_rows": samples * clones if cls else None,  # rows of a GPU: the sum is not divided by them
        "model.target.norm": chosen(p, "{}_norm_target_layer", ("instance", "layer", "batch")),
        "model.target.final": chosen(p, "{}_norm_targets", ("instance", "layer")),
        "ema.decay": p(model + "ema_decay"),
        "ema.end_decay": p(model + "ema_end_decay"),
        "ema.anneal": p(model + "ema_anneal_end_step"),
        "train.steps": p("optimization.max_update"),
        "train.seed": p(model + "seed"),
        "data.batch": batch,
        **FRONTS[modality](p, own),
        **optimiser(p),
    }


def chosen(p: Reader, pattern: str, kinds: tuple[str, ...]) -> str | None:
    found = [kind for kind in kinds if p("model." + pattern.format(kind))]
    return found[0] if len(found) == 1 else None if not found else "several"


def batches(p: Reader, modality: str) -> tuple[int, float]:
    """Samples of a GPU, and of a step in the unit of `data.batch`."""
    (accumulated,) = p("optimization.update_freq")
    gpus = p("distributed_world_size") * accumulated
    if modality == "audio":
        return 0, p("dataset.max_tokens") * gpus / p("task.sample_rate")
    samples = p("dataset.batch_size")
    return samples, samples * gpus


def image_front(p: Reader, own: str) -> dict[str, Any]:
    p.same(own + "embed_dim", p("model.embed_dim"))
    side = p(own + "input_size")
    return {
        "model.front": "ImageFront", "model.front.height": side, "model.front.width": side,
        "model.front.patch": p(own + "patch_size"), "model.front.channels": p(own + "in_chans"),
    }  # fmt: skip


def audio_front(p: Reader, own: str) -> dict[str, Any]:
    for key in (own, "task.precompute_mask_config."):
        p.same(key + "feature_encoder_spec", CONV_LAYERS)
    for name in ("mask_prob", "mask_prob_adjust", "mask_length"):  # the loader masks, as the model is told to
        p.same(f"task.precompute_mask_config.{name}", p(own + name))
    p.same("task.precompute_mask_config.clone_batch", p("model.clone_batch"))
    rate = p("task.sample_rate")
    return {
        "model.front": "WaveformFront", "model.front.sample_rate": rate,
        "model.front.conv_layers": ((512, 10, 5), *[(512, 3, 2)] * 4, (512, 2, 2), (512, 2, 2)),
        "model.front.position_width": p(own + "conv_pos_width"),
        "model.front.position_groups": p(own + "conv_pos_groups"),
        "model.front.position_layers": p(own + "conv_pos_depth"),
        "model.front.alibi": p(own + "use_alibi_encoder"),
        "data.max_seconds": p("task.max_sample_size") / rate,
        "data.min_seconds": p("task.min_sample_size") / rate, "data.pad": p("task.enable_padding"),
        "data.wave_norm": "fairseq" if p("task.normalize") else "none",
    }  # fmt: skip


def text_front(p: Reader, own: str) -> dict[str, Any]:
    return {
        "model.front": "TextFront", "model.front.max_positions": p(own + "max_source_positions"),
        "model.front.dropout": p(own + "dropout"), "data.block": p("task.tokens_per_sample"),
    }  # fmt: skip


FRONTS: dict[str, Callable[[Reader, str], dict[str, Any]]] = {
    "image": image_front, "audio": audio_front, "text": text_front
}  # fmt: skip

OF_OTHERS = {
    "image": ("data.max_seconds", "data.min_seconds", "data.pad", "data.block", "data.wave_norm"),
    "audio": ("data.block", "data.crop_scale", "data.flip", "data.mean", "data.std"),
    "text": ("data.max_seconds", "data.min_seconds", "data.pad", "data.crop_scale", "data.flip", "data.mean",
             "data.std", "data.wave_norm"),
}  # fmt: skip
"""our keys that a modality does not read"""


def optimiser(p: Reader) -> dict[str, Any]:
    """Of every parameter group: the groups of a composite optimizer must agree."""
    groups = sorted({key.split(".")[2] for key in p.values if key.startswith("optimizer.groups.")})
    found = [one_optimiser(p, f"optimizer.groups.{name}.") for name in groups]
    if not found:
        (lr,) = p("optimizer.lr")
        p.same("optimization.lr", [lr])
        p.same("lr_scheduler.lr", [lr])
        found = [one_optimiser(p, "")]
    else:
        p("optimization.lr")  # a group's lr_float goes first (composite.py)
        p.same("lr_scheduler._name", "pass_through")
    for other in found[1:]:
        if other != found[0]:
            p.wrong.append(f"groups of the optimizer differ: {found[0]} and {other}")
    return {**found[0], "optim.clip": p("optimization.clip_norm") or None}


def one_optimiser(p: Reader, group: str) -> dict[str, Any]:
    scheduler, adam = group + "lr_scheduler.", group + "optimizer."
    p.same(scheduler + "_name", "cosine")
    if p.has(scheduler + "warmup_init_lr"):
        p.same(scheduler + "warmup_init_lr", -1)  # from min_lr
    return {
        "optim.lr": p(group + "lr_float") if group else p("optimizer.lr")[0],
        "optim.betas": tuple(p(adam + "adam_betas")),
        # what a group leaves out has the default of optim/adam.py and lr_scheduler/cosine_lr_scheduler.py
        "optim.eps": p(adam + "adam_eps") if p.has(adam + "adam_eps") else 1e-8,
        "optim.weight_decay": p(adam + "weight_decay"),
        "optim.warmup": p(scheduler + "warmup_updates"),
        "optim.min_lr": p(scheduler + "min_lr") if p.has(scheduler + "min_lr") else 0.0,
    }


def matches(key: str, patterns: Mapping[str, Any]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def complaints(ours: Mapping[str, Any], published: Mapping[str, Any]) -> tuple[list[str], Reader]:
    """What differs or is left over of two flat configs; and what was read."""
    p = Reader(published)
    expected = wanted(p)
    modality = str(p("model.supported_modality")).lower()
    fixed = {k: v for k, (v, _) in {**DIFFERENT, **IN_THE_CODE}.items() if k in ours}
    expected = {**fixed, **expected}
    wrong = list(p.wrong)
    for key, value in ours.items():
        if key in OF_OTHERS[modality] or matches(key, OURS):
            continue
        if key not in expected:
            wrong.append(f"our {key} is not compared")
        elif value != expected[key]:
            wrong.append(f"{key} is {value!r}, published {expected[key]!r}")
    wrong += [f"we lack {key}" for key in expected.keys() - ours.keys()]
    others = [f"model.modalities.{name}.*" for name in FRONTS if name != modality]
    wrong += [
        f"published {key} is neither compared nor set aside"
        for key in p.values
        if key not in p.read and not matches(key, SET_ASIDE) and not matches(key, dict.fromkeys(others))
    ]
    return wrong, p


@pytest.fixture(scope="module")
def configs(goldens: Path) -> dict[str, Any]:
    return json.loads((goldens / "published_configs.json").read_text())


def both(name: str, configs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A preset and its published config, flat."""
    return dict(leaves(preset(name))), dict(leaves(configs[PUBLISHED[name]]))


def test_every_preset_but_the_tiny_ones_has_a_published_config() -> None:
    assert {name for name in PRESETS if not name.endswith("_tiny")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_configs(name: str, configs: dict[str, Any]) -> None:
    assert set(configs) == set(PUBLISHED.values())
    wrong, _ = complaints(*both(name, configs))
    assert not wrong, "\n".join(wrong)


def test_every_entry_of_the_lists_is_needed(configs: dict[str, Any]) -> None:
    keys = {key for config in configs.values() for key, _ in leaves(config)}
    assert not [pattern for pattern in SET_ASIDE if not any(fnmatchcase(key, pattern) for key in keys)]
    mine = {key for name in PUBLISHED for key, _ in leaves(preset(name))}
    for table in (OURS, DIFFERENT, IN_THE_CODE):
        assert not [pattern for pattern in table if not any(fnmatchcase(key, pattern) for key in mine)]


def other(value: Any) -> Any:
    """A value of the same kind that is not this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, (list, tuple)):
        return type(value)(map(other, value))
    return 7 if value is None else f"{value}x"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_changed_value_is_noticed_on_either_side(name: str, configs: dict[str, Any]) -> None:
    ours, published = both(name, configs)
    modality = name.split("_")[0]
    for key, value in ours.items():
        if key in OF_OTHERS[modality] or matches(key, OURS):
            continue
        assert complaints({**ours, key: other(value)}, published)[0], f"a changed {key} is not noticed"
    _, p = complaints(ours, published)
    assert not [key for key in p.read if matches(key, SET_ASIDE)], "compared and set aside"
    own = f"model.modalities.{modality}."
    idle = {own + "prenet_layerdrop"} if not p(own + "prenet_depth") else set()
    if any(key.startswith("optimizer.groups.") for key in p.values):
        idle.add("optimization.lr")
    for key in p.read - idle - {"model.supported_modality"}:
        changed = {**published, key: other(published[key])}
        assert complaints(ours, changed)[0], f"a changed published {key} is not noticed"
    assert complaints(ours, {**published, "model.new_switch": 1})[0]
    assert complaints({**ours, "optim.new": 1}, published)[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_translating_a_published_config_gives_the_preset(name: str, configs: dict[str, Any]) -> None:
    """What files of the original become, without what only a run has."""
    cfg: Config = preset(name)
    modality = cfg.model.modality.upper()
    local = f"modality_encoders.{modality}.local_encoder."
    shapes = {f"{local}proj": (1,), f"{local}embed_tokens.weight": (50_265, 8),
              f"{local}embed_positions.weight": (514, 8)}  # fmt: skip
    found = translate(configs[PUBLISHED[name]], shapes, name)
    assert found == dataclasses.replace(cfg.model, cls_rows=None)
