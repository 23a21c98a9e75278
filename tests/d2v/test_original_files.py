"""The original's files of every published config: opened and run; what of configs is named, what refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import d2v
from d2v.config.toml import CheckpointError
from d2v.config.tune import DropConfig, HeadConfig, tuned_model_config
from d2v.formats.fairseq_config import translate
from d2v.formats.fairseq_names import KNOWN
from d2v.formats.recorded import recorded_waves
from d2v.model import Data2Vec
from d2v.model.tuned import FineTuned
from tests.d2v.original_files import (
    NAMES,
    nested,
    pickled,
    shrunk,
    shrunk_preset,
    source_of,
    trainer_state,
    weights,
)

SHAPES = {
    "modality_encoders.TEXT.local_encoder.embed_tokens.weight": (50_265, 8),
    "modality_encoders.TEXT.local_encoder.embed_positions.weight": (514, 8),
}


@pytest.fixture(scope="module")
def published(goldens: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((goldens / "published_configs.json").read_text())
    return found


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Any:
    """What was ignored since the last call, one entry a setting."""
    caplog.set_level(logging.WARNING, logger="d2v")

    def entries() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.name == "d2v"]
        caplog.clear()
        assert len(lines) <= 1
        return re.findall(r"(model\S* (?:= .+? )?\([^()]+\))(?:, |$)", lines[0]) if lines else []

    return entries


def whole(published: dict[str, Any], name: str) -> dict[str, Any]:
    """The config as fairseq completes it."""
    config = copy.deepcopy(published[name])
    return {key: config[key] for key in ("model", "task", "optimization", "criterion")}


def translated(tree: dict[str, Any], modality: str) -> Any:
    shapes = SHAPES if modality == "text" else {f"modality_encoders.{modality.upper()}.x": (1,)}
    return translate(tree, shapes, "x.pt")


def put(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with the value at a dotted key."""
    tree = copy.deepcopy(tree)
    *places, last = key.split(".")
    place = tree
    for name in places:
        place = place.setdefault(name, {})
    place[last] = value
    return tree


@pytest.mark.parametrize("form", ["model", "model_as_written"])
@pytest.mark.parametrize("name", NAMES)
def test_every_published_config_opens(
    published: dict[str, Any], goldens: Path, tmp_path: Path, warned: Any, name: str, form: str
) -> None:
    modality = name.split("_")[0]
    cfg, tree = shrunk_preset(name), {**whole(published, name), "common": {"seed": 1}}
    tree["model"] = shrunk(published[name][form], modality)
    flat = weights(cfg)
    layout = json.loads((goldens / "state_dict_keys.json").read_text()).get(name, {})
    if layout:
        keys = {*layout["student"], *(f"_ema.{key}" for key in layout["ema"])}
        beyond = r"(^|context_encoder\.)(_ema\.)?(blocks\.)?(\d+)\.(norm|attn|mlp)"
        most = {True: cfg.prenet_depth, False: cfg.depth}
        assert flat.keys() == {
            key for key in keys
            if not (m := re.search(beyond, key)) or int(m[4]) < most["context_encoder" in key]
        }  # fmt: skip
    torch.save({"args": None, "cfg": tree, "model": nested(flat)}, tmp_path / "plain.pt")
    with pickled() as classes:
        kind = classes.Modality[modality.upper()]
        if form == "model":  # a structured config has enums, and interpolations where the yaml has none
            tree["model"]["supported_modality"] = tree["model"]["modalities"][modality]["type"] = kind
            tree["model"]["seed"] = "${common.seed}"
            tree["model"]["modalities"][modality]["num_alibi_heads"] = "${model.num_heads}"
            tree["task"]["data"] = "${env:PWD}/x"
        cfgs = classes.omega(tree)
        torch.save({"args": None, "cfg": cfgs, "model": nested(flat)}, tmp_path / "omega.pt",
                   _use_new_zipfile_serialization=form == "model")  # fmt: skip
    for file in ("plain.pt", "omega.pt"):
        model = d2v.load(tmp_path / file)
        assert isinstance(model, Data2Vec) and not model.training
        assert model.cfg == dataclasses.replace(cfg, init_std=model.cfg.init_std)
        state = model.state_dict()
        assert state.keys() == flat.keys()
        assert all(torch.equal(state[key], t.float()) for key, t in flat.items())
        heads = f"model.modalities.{modality}."
        others = [f"model.modalities.{other} (another modality)"
                  for other in ("audio", "image", "text") if other != modality]  # fmt: skip
        expected = others if form == "model" else []
        if name == "audio_base":
            expected.append(f"{heads}prenet_layerdrop = 0.05 (prenet_depth is 0)")
        if name == "text_large_pgrp_1M":
            expected.append("model.decoder_group = True (a name of the optimizer's)")
        if name == "image_huge14" and form != "model":  # fairseq drops it while it completes
            expected.append(f"{heads}decoder.final_layer_norm = False (unknown to the original)")
        assert sorted(warned()) == sorted(expected)
    source = source_of(cfg)
    with torch.no_grad():
        assert model.features(source).x.isfinite().all()
        assert model.features(source, teacher=True).x.isfinite().all()
        assert all(loss.isfinite().all() for loss in model.train()(source).losses.values())


def test_known_keys_are_the_originals(published: dict[str, Any]) -> None:
    model = published["image_base"]["model"]
    assert model.keys() == KNOWN[""]
    for name in ("audio", "image", "text"):
        section = model["modalities"][name]
        assert section.keys() == KNOWN["modality"] | KNOWN[name.upper()]
        assert section["decoder"].keys() == KNOWN["decoder"]


AUDIO, IMAGE, TEXT = (f"model.modalities.{name}." for name in ("audio", "image", "text"))


@pytest.mark.parametrize(
    ("name", "key", "value", "why"),
    [
        ("audio_base", AUDIO + "prenet_layerdrop", 0.3, "prenet_depth is 0"),
        ("audio_base", AUDIO + "start_drop_path_rate", 0.1, "prenet_depth is 0"),
        ("audio_base", AUDIO + "end_drop_path_rate", 0.1, "prenet_depth is 0"),
        ("audio_base", AUDIO + "remove_masks", True, "the original never reads it"),
        ("audio_base", AUDIO + "mask_prob_min", 0.5, "not between 0 and mask_prob"),
        ("audio_base", AUDIO + "mask_prob_min", -1, "not between 0 and mask_prob"),
        ("text_base", "model.average_top_k_layers", 99, "depth is 12: 12 layers are averaged"),
        ("text_base", "model.average_top_k_layers", 0, "depth is 12: 12 layers are averaged"),
        ("audio_base", "model.a_key_of_tomorrow", 1, "unknown to the original"),
        ("audio_base", "model.modalities.video", {"x": 1}, "unknown to the original"),
        ("audio_base", AUDIO + "decoder.final_layer_norm", True, "unknown to the original"),
        ("image_base", IMAGE + "add_masks", True, "the encoder reads no masked tokens"),
        ("image_base", IMAGE + "encoder_zero_mask", False, "the encoder reads no masked tokens"),
        ("image_base", IMAGE + "mask_channel_prob", 0.2, "the encoder reads no masked tokens"),
        ("image_base", IMAGE + "enc_dec_transformer", True, "transformer_decoder is False"),
        ("image_base", IMAGE + "decoder.projection_layers", 2, "Decoder2d always has 1"),
        ("image_base", IMAGE + "learned_alibi", True, "use_alibi_encoder is False"),
        ("image_large", IMAGE + "prenet_layerdrop", 0.1, "prenet_depth is 0"),
        ("text_base", TEXT + "learned_alibi_scale_per_layer", True, "use_alibi_encoder is False"),
        ("text_base", TEXT + "inverse_mask", True, "single tokens are not masked with it"),
        ("text_base", TEXT + "keep_masked_pct", 0.5, "single tokens are not masked with it"),
        ("text_base", TEXT + "mask_dropout", 0.1, "single tokens are not masked with it"),
        ("text_base", TEXT + "ema_local_encoder", True, "the teacher has blocks only"),
        ("text_base", TEXT + "encoder_zero_mask", False, "the encoder reads no masked tokens"),
        ("text_large", "model.decoder_group", True, "a name of the optimizer's"),
    ],
)
def test_what_has_no_effect_is_named(
    published: dict[str, Any], warned: Any, name: str, key: str, value: Any, why: str
) -> None:
    tree, modality = whole(published, name), name.split("_")[0]
    config = translated(tree, modality)
    before = warned()
    assert translated(put(tree, key, value), modality) == config
    shown = "" if isinstance(value, dict) else f" = {value!r}"
    assert f"{key}{shown} ({why})" in set(warned()) - set(before)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("audio_large", AUDIO + "prenet_layerdrop", 0.05),
        ("audio_large", AUDIO + "start_drop_path_rate", 0.1),
        ("audio_large", AUDIO + "end_drop_path_rate", 0.1),
        ("audio_base", AUDIO + "mask_prob_min", 0.2),
        ("audio_base", AUDIO + "encoder_zero_mask", False),
        ("audio_base", AUDIO + "mask_channel_prob", 0.1),
        ("audio_base", AUDIO + "mask_dropout", 0.1),
        ("audio_base", AUDIO + "local_grad_mult", 0.1),
        ("audio_base", AUDIO + "learned_alibi_scale", False),
        ("audio_base", AUDIO + "num_alibi_heads", 8),
        ("audio_base", AUDIO + "type", "IMAGE"),
        ("audio_base", AUDIO + "type", 2),
        ("audio_base", AUDIO + "decoder.add_positions_all", True),
        ("audio_base", AUDIO + "decoder", None),
        ("audio_base", "task.normalize", "often"),
        ("audio_base", "task.sample_rate", "fast"),
        ("audio_base", "task.precompute_mask_config.mask_prob", 0.7),
        ("audio_base", "task.precompute_mask_config.non_overlapping", True),
        ("audio_base", "model.end_drop_path_rate", 0.1),
        ("audio_base", "model.norm_affine", False),
        ("audio_base", "model.d2v_loss", 2),
        ("image_base", IMAGE + "prenet_layerdrop", 0.05),
        ("image_base", IMAGE + "keep_masked_pct", 0.2),
        ("image_base", IMAGE + "transformer_decoder", True),
        ("image_base", "model.supported_modality", "Modality.TEXT"),
        ("image_large", "task.precompute_mask_config.mask_length", 4),
        ("text_base", TEXT + "mask_prob_min", 0.1),
        ("text_base", TEXT + "local_grad_mult", 0),
        ("text_base", TEXT + "learned_pos", False),
    ],
)
def test_what_changes_the_maths_is_refused(
    published: dict[str, Any], name: str, key: str, value: Any
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(key)):
        translated(put(whole(published, name), key, value), name.split("_")[0])


def test_speech_is_read_as_the_file_says(published: dict[str, Any], tmp_path: Path) -> None:
    tree = put(put(whole(published, "audio_base"), "task.normalize", False), "task.sample_rate", 8_000)
    front = translated(tree, "audio").front
    assert front.sample_rate == 8_000
    for inner, norm in (
        (tree, "none"),
        (whole(published, "audio_base"), "fairseq"),
        ({"model": {}}, "fairseq"),
    ):
        tuned = {"model": {"w2v_args": inner}, "task": {"normalize": norm != "fairseq"}}
        for cfg in (inner, tuned):
            torch.save({"cfg": cfg, "model": {}}, tmp_path / "x.pt")
            assert recorded_waves(tmp_path / "x.pt", front) == norm


def test_the_prenets_dropout_of_text_without_one_is_named(published: dict[str, Any], warned: Any) -> None:
    """It is kept, for our model does not read it either."""
    tree = put(whole(published, "text_base"), TEXT + "prenet_dropout", 0.1)
    assert translated(tree, "text").prenet_dropout == 0.1
    assert TEXT + "prenet_dropout = 0.1 (prenet_depth is 0)" in warned()


def test_drop_path_of_one_block_is_its_first_rate(published: dict[str, Any], warned: Any) -> None:
    tree = put(put(whole(published, "audio_base"), "model.depth", 1), "model.end_drop_path_rate", 0.1)
    assert translated(tree, "audio").depth == 1
    assert "model.end_drop_path_rate = 0.1 (depth is 1)" in warned()
    with pytest.raises(CheckpointError, match=r"model\.start_drop_path_rate is 0\.1"):
        translated(put(tree, "model.start_drop_path_rate", 0.1), "audio")


def test_speech_without_alibi_has_nothing_to_learn_of_it(published: dict[str, Any], warned: Any) -> None:
    tree = put(whole(published, "audio_base"), AUDIO + "use_alibi_encoder", False)
    assert not translated(put(tree, AUDIO + "learned_alibi", True), "audio").front.alibi
    assert AUDIO + "learned_alibi = True (use_alibi_encoder is False)" in warned()


@pytest.mark.parametrize(
    "value", ["AUDIO", "audio", "Modality.AUDIO", 1, "???", None, "${common.kind}", "${.other}"]
)
def test_a_modality_is_a_name_a_number_or_not_said(published: dict[str, Any], value: Any) -> None:
    tree = whole(published, "audio_base") | {"common": {"kind": "AUDIO"}}
    tree["model"]["other"] = "AUDIO"
    assert translated(put(tree, "model.supported_modality", value), "audio").modality == "audio"


def test_interpolations_lead_anywhere(published: dict[str, Any]) -> None:
    tree = whole(published, "audio_base")
    tree["common"] = {"widths": [8, {"dim": "${common.widths.0}"}, "${optimization.lr}"], "nowhere": "${a.b}"}
    tree["model"] |= {
        "embed_dim": "${common.widths[1].dim}",
        "num_heads": "${.average_top_k_layers}",
        "encoder_dropout": "${model.modalities.image.decoder.input_dropout}",
    }
    tree["model"]["modalities"]["audio"] |= {
        "num_alibi_heads": "${...num_heads}",
        "decoder": "${model.modalities.image.decoder}",
    }
    config = translated(tree, "audio")
    assert (config.dim, config.heads, config.encoder_dropout) == (8, 8, 0.1)
    assert (config.decoder.dim, config.decoder.kernel) == (384, 5)
    for value, words in (("${x.y}", "leads nowhere"), ("${model.embed_dim}", "leads in a circle")):
        with pytest.raises(CheckpointError, match=words):
            translated(put(tree, "model.embed_dim", value), "audio")


@pytest.mark.parametrize("zipped", [2, 4, 0], ids=["zip", "protocol 4", "stream"])
@pytest.mark.parametrize("name", ["image_base", "audio_base", "text_base"])
def test_what_a_trainer_saves_beside_the_model_is_left_alone(
    published: dict[str, Any], tmp_path: Path, name: str, zipped: int
) -> None:
    flat = weights(shrunk_preset(name))
    tree = {**published[name], "model": shrunk(published[name]["model"], name.split("_")[0])}
    with pickled() as classes:
        state = trainer_state(classes.omega(tree), nested(flat), classes)
        torch.save(state, tmp_path / "x.pt", pickle_protocol=zipped or 2,
                   _use_new_zipfile_serialization=bool(zipped))  # fmt: skip
    if zipped == 2:
        with zipfile.ZipFile(tmp_path / "x.pt") as file:
            names = {arg for op, arg, _ in pickletools.genops(file.read("x/data.pkl")) if op.name == "GLOBAL"}
        assert names >= {
            "fairseq.data.dictionary Dictionary", "torch._tensor _rebuild_from_type_v2", "__builtin__ type",
            "torch._utils _rebuild_parameter_with_state", "data2vec.models.data2vec2 Data2VecMultiConfig",
        }  # fmt: skip
    state = d2v.load(tmp_path / "x.pt").state_dict()
    assert all(torch.equal(state[key], t.float()) for key, t in flat.items())


TUNED = {
    "image_base": ("classify", "mae_image_classification", "pretrained_model_args", "model."),
    "image_large": ("classify", "mae_image_classification", "pretrained_model_args", "model."),
    "audio_base": ("ctc", "wav2vec_ctc", "w2v_args", "w2v_encoder.w2v_model."),
    "audio_large": ("ctc", "wav2vec_ctc", "w2v_args", "w2v_encoder.w2v_model."),
    "text_base": ("sentence", "data2vec_text_classification", "pretrained_model_args", "model."),
}


def tuned_tree(published: dict[str, Any], name: str) -> dict[str, Any]:
    """The config of a fine-tuned file: that of pretraining with what fine-tuning writes into it."""
    modality = name.split("_")[0]
    task, kind, place, _ = TUNED[name]
    inner = {**whole(published, name), "criterion": None, "lr_scheduler": None}
    inner["model"] = shrunk(inner["model"], modality)
    model, sections = inner["model"], inner["model"]["modalities"]
    outer: dict[str, Any] = {"_name": kind, place: inner, "data": "${task.data}", "model_path": "???"}
    if task == "classify":
        model |= dict.fromkeys(("encoder_dropout", "post_mlp_drop", "attention_dropout", "layerdrop"), 0.0)
        model |= {"drop_path_rate": 0.1, "start_drop_path_rate": 0.0222, "end_drop_path_rate": 0.1}
        sections["image"] |= {"start_drop_path_rate": 0.0, "end_drop_path_rate": 0.0111}
        outer |= {"num_classes": 5, "use_fc_norm": True, "prediction_mode": "MEAN_POOLING", "mixup": 0.7}
    elif task == "ctc":
        model |= {"dropout_input": 0.1, "encoder_dropout": 0.0, "layerdrop": 0.1, "activation_dropout": 0.1}
        for section in sections.values():
            if isinstance(section, dict):
                section |= {
                    "mask_prob": 0.0, "mask_length": 10, "mask_channel_prob": 0.5, "mask_channel_length": 64,
                    "mask_dropout": 0.1, "inverse_mask": False, "encoder_zero_mask": False,
                    "local_grad_mult": 0.0, "prenet_layerdrop": 0.1, "prenet_dropout": 0.0,
                    "learned_alibi_scale": False,
                }  # fmt: skip
        sections["audio"]["decoder"] = None
        outer |= {"blank_weight": 0.0, "blank_mode": "add", "final_dropout": 0.0, "normalize": True}
    else:
        outer |= {"pooler_activation_fn": "tanh", "pooler_dropout": 0.0}
        outer |= {"spectral_norm_classification_head": False}
    return {"model": outer, "task": {"_name": "x", "data": "/data"}}


def tuned_model(name: str) -> FineTuned:
    torch.manual_seed(0)
    head = HeadConfig(task=TUNED[name][0], outputs=5)  # type: ignore[arg-type]
    return FineTuned(tuned_model_config(shrunk_preset(name), DropConfig()), head).eval()


@pytest.mark.parametrize("container", ["plain", "omega"])
@pytest.mark.parametrize("name", TUNED)
def test_every_fine_tuned_model_opens(
    published: dict[str, Any], tmp_path: Path, warned: Any, name: str, container: str
) -> None:
    expected, tree, modality = tuned_model(name), tuned_tree(published, name), name.split("_")[0]
    place, prefix = TUNED[name][2:]
    state = expected.state_dict()
    with pickled() as classes:
        if container == "omega":
            inner = tree["model"][place]
            inner["model"]["supported_modality"] = classes.Modality[modality.upper()]
            inner["model"]["modalities"][modality]["num_alibi_heads"] = "${model.num_heads}"
            inner["model"]["modalities"][modality]["mask_noise_std"] = (
                "${model.mask_noise}"  # of the outer one
            )
            tree["model"]["mask_noise"] = 0.01
            if modality == "image":
                tree["model"]["prediction_mode"] = classes.PredictionMode.MEAN_POOLING
        left = {prefix + f"modality_encoders.{modality.upper()}.decoder.proj.weight": torch.ones(1)}
        cfg = classes.omega(tree) if container == "omega" else tree
        torch.save(trainer_state(cfg, {**state, **left}, classes), tmp_path / "x.pt")
    model = d2v.load(tmp_path / "x.pt")
    assert isinstance(model, FineTuned) and model.head_cfg == expected.head_cfg
    assert not [entry for entry in warned() if "another modality" not in entry]
    mine = model.state_dict()
    assert mine.keys() == state.keys() and all(torch.equal(mine[key], t) for key, t in state.items())
    source = source_of(expected.cfg)
    with torch.no_grad():
        assert torch.equal(model.logits(source), expected.logits(source))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("image_base", "prediction_mode", "CLS_TOKEN"),
        ("image_base", "prediction_mode", 3),
        ("image_base", "use_fc_norm", False),
        ("text_base", "pooler_activation_fn", "relu"),
        ("text_base", "spectral_norm_classification_head", True),
        ("audio_base", "blank_weight", 2.0),
        ("audio_base", "w2v_args.model.modalities.audio.extractor_mode", "default"),
        ("image_base", "pretrained_model_args.model.layer_norm_first", True),
    ],
)
def test_what_changes_the_logits_is_refused(
    published: dict[str, Any], tmp_path: Path, name: str, key: str, value: Any
) -> None:
    tree = put(tuned_tree(published, name), f"model.{key}", value)
    torch.save({"cfg": tree, "model": tuned_model(name).state_dict()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=rf"{key.rsplit('.', 1)[-1]} is {value!r}, supported is"):
        d2v.load(tmp_path / "x.pt")
