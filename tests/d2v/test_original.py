"""The original's `.pt` files: what opens, what it becomes, and what is refused."""

from __future__ import annotations

import argparse
import collections
import enum
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v.config.fronts import ImageFront, TextFront, WaveformFront
from d2v.config.toml import CheckpointError
from d2v.formats.fairseq import load_original
from d2v.formats.fairseq_config import translate

CASES = ("image_base", "audio_base", "text_base")


def golden_state(goldens: Path, case: str) -> dict:
    """A golden's weights and config as the original's trainer lays them out in a file."""
    arrays = np.load(goldens / f"weights_{case}.npz")
    model, teacher = collections.OrderedDict(), {}
    for key in arrays.files:
        place, name = (teacher, key.removeprefix("_ema.")) if key.startswith("_ema.") else (model, key)
        place[name] = torch.from_numpy(arrays[key])
    model["_ema"] = teacher
    cfg = json.loads((goldens / f"weights_{case}.json").read_text())["cfg"]
    return {"args": None, "cfg": {"model": cfg, "task": {"data": "${env:PWD}/x"}}, "model": model}


def edited(goldens: Path, case: str, tmp_path: Path, **changes: object) -> Path:
    """A file of `case` with config values replaced; `modality__key` means the case's own modality."""
    state = golden_state(goldens, case)
    model = state["cfg"]["model"]
    section = model["modalities"][case.split("_")[0]]
    for key, value in changes.items():
        place = section if key.startswith("modality__") else model
        place[key.removeprefix("modality__")] = value
    torch.save(state, tmp_path / "edited.pt")
    return tmp_path / "edited.pt"


def tiny(tmp_path: Path, root: object, **options: object) -> Path:
    torch.save(root, tmp_path / "tiny.pt", **options)
    return tmp_path / "tiny.pt"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_goldens_bit_for_bit(goldens, tmp_path, case, zipped):
    torch.save(golden_state(goldens, case), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    _, tensors = load_original(tmp_path / "x.pt")
    arrays = np.load(goldens / f"weights_{case}.npz")
    assert set(tensors) == set(arrays.files)
    for key in arrays.files:
        assert tensors[key].dtype == torch.float32 and np.array_equal(tensors[key].numpy(), arrays[key]), key


def test_pickled_omegaconf_tree_equals_plain_containers(goldens, tmp_path):
    tree = load_original(goldens / "ckpt_image_base.pt")
    torch.save(golden_state(goldens, "image_base"), tmp_path / "x.pt")
    plain = load_original(tmp_path / "x.pt")
    assert tree[0] == plain[0]
    assert all(torch.equal(tree[1][key], plain[1][key]) for key in plain[1])
    assert set(tree[1]) == set(plain[1])
    assert "omegaconf" not in sys.modules and "fairseq" not in sys.modules


def test_image_config(goldens):
    config, _ = load_original(goldens / "ckpt_image_base.pt")
    assert config.front == ImageFront(height=64, width=64, patch=16, channels=3, extra_tokens=1)
    assert (config.dim, config.heads, config.prenet_depth, config.depth) == (64, 4, 2, 3)
    assert (config.mask.prob, config.mask.length, config.mask.adjust, config.mask.clones) == (0.8, 3, 0.07, 4)
    decoder = config.decoder
    assert (decoder.dim, decoder.groups, decoder.kernel, decoder.layers) == (64, 16, 3, 6)
    assert (config.target.top_k, config.target.norm, config.target.final) == (3, "instance", "layer")
    assert (config.cls_loss, config.cls_rows, config.loss_scale, config.norm_eps) == (0.01, None, None, 1e-6)
    assert not config.ema_encoder_only


def test_audio_config(goldens, tmp_path):
    config, _ = load_original(edited(goldens, "audio_base", tmp_path, layerdrop=0.05, post_mlp_drop=0.25,
                                     encoder_dropout=0.1, modality__prenet_dropout=0.3))  # fmt: skip
    assert isinstance(config.front, WaveformFront)
    assert config.front.conv_layers == ((64, 10, 5), *[(64, 3, 2)] * 4, (64, 2, 2), (64, 2, 2))
    assert (config.front.position_width, config.front.position_layers, config.front.alibi) == (95, 5, True)
    assert (config.decoder.dim, config.decoder.kernel, config.decoder.residual) == (32, 7, True)
    assert (config.layerdrop, config.post_mlp_dropout, config.encoder_dropout) == (0.05, 0.25, 0.1)
    assert (config.prenet_dropout, config.target.final, config.cls_loss) == (0.3, None, 0.0)


def test_text_config(goldens, tmp_path):
    config, _ = load_original(
        edited(goldens, "text_base", tmp_path, modality__dropout=0.1, modality__mask_noise_std=0.01,
               layer_norm_target_layer=True, instance_norm_target_layer=False, instance_norm_targets=True)
    )  # fmt: skip
    assert config.front == TextFront(vocab_size=100, max_positions=64, dropout=0.1)
    assert (config.target.norm, config.target.final) == ("layer", "instance")  # as text_large
    decoder = config.decoder
    assert (decoder.projection_layers, decoder.residual, decoder.noise_std) == (2, False, 0.01)
    assert (config.loss_scale, config.ema_encoder_only) == (1.0, True)


def test_interpolations_are_followed(goldens, tmp_path):
    state = golden_state(goldens, "audio_base")
    state["cfg"]["common"] = {"width": "${deeper.width}"}
    state["cfg"]["deeper"] = {"width": 64}
    state["cfg"]["model"]["embed_dim"] = "${common.width}"
    state["cfg"]["model"]["modalities"]["audio"]["num_alibi_heads"] = "${model.num_heads}"
    assert load_original(tiny(tmp_path, state))[0].dim == 64
    state["cfg"]["deeper"]["width"] = "${common.width}"
    with pytest.raises(CheckpointError, match="circle"):
        load_original(tiny(tmp_path, state))
    state["cfg"]["common"] = {}
    with pytest.raises(CheckpointError, match=r"\$\{common.width\} in its cfg leads nowhere"):
        load_original(tiny(tmp_path, state))


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("image_base", "layer_norm_first", True),
        ("image_base", "end_of_block_targets", True),
        ("image_base", "recon_loss", 0.5),
        ("image_base", "shared_decoder", {"decoder_dim": 8}),
        ("image_base", "ema_encoder_only", True),
        ("image_base", "modality__transformer_decoder", True),
        ("image_base", "modality__fixed_positions", False),
        ("image_base", "modality__use_alibi_encoder", True),
        ("image_base", "modality__embed_dim", 32),
        ("image_base", "modality__inverse_mask", False),
        ("image_base", "modality__mask_prob_min", 0.5),
        ("audio_base", "modality__extractor_mode", "default"),
        ("audio_base", "modality__conv_pos_pre_ln", True),
        ("audio_base", "modality__learned_alibi", True),
        ("audio_base", "modality__learned_alibi_scale_per_layer", True),
        ("audio_base", "modality__learned_alibi_scale_per_head", False),
        ("audio_base", "modality__add_masks", True),
        ("text_base", "modality__use_alibi_encoder", True),
        ("text_base", "modality__mask_length", 5),
        ("text_base", "supported_modality", "AUDIO"),
        ("text_base", "depth", "many"),
        ("text_base", "depth", 2.5),
        ("text_base", "depth", True),
    ],
)
def test_settings_off_the_published_path_are_refused_by_name(goldens, tmp_path, case, key, value):
    with pytest.raises(CheckpointError, match=key.removeprefix("modality__")) as caught:
        load_original(edited(goldens, case, tmp_path, **{key: value}))
    assert repr(value) in str(caught.value) and "edited.pt" in str(caught.value)


def test_two_final_norms_are_refused(goldens, tmp_path):
    with pytest.raises(CheckpointError, match="layer_norm_targets and instance_norm_targets"):
        load_original(edited(goldens, "image_base", tmp_path, instance_norm_targets=True))


def test_unused_modalities_and_unknown_keys_do_not_matter(goldens, tmp_path):
    state = golden_state(goldens, "image_base")
    state["cfg"]["model"]["modalities"]["audio"]["extractor_mode"] = "default"
    state["cfg"]["model"]["a_key_of_tomorrow"] = 1
    state["cfg"]["model"]["supported_modality"] = None
    assert load_original(tiny(tmp_path, state))[0].modality == "image"


def test_absent_keys_take_the_originals_defaults(goldens, tmp_path):
    state = golden_state(goldens, "audio_base")
    for key in ("encoder_dropout", "attention_dropout", "activation_dropout", "loss_beta"):
        del state["cfg"]["model"][key]
    state["cfg"]["model"]["post_mlp_drop"] = "???"
    config, _ = load_original(tiny(tmp_path, state))
    assert (config.encoder_dropout, config.attention_dropout, config.activation_dropout) == (0.1, 0.1, 0.0)
    assert (config.post_mlp_dropout, config.loss_beta) == (0.1, 0.0)


@pytest.mark.parametrize(
    "spec",
    [
        "__import__('os').system('x')",
        "[(1, 2)]",
        "[(1, 2, 3)] * 10**9",
        "[(8, 0, 1)]",
        "(8, 1, 1)",
        "",
        "[",
        "[]",
    ],
)
def test_conv_spec_is_parsed_not_evaluated(goldens, tmp_path, spec):
    with pytest.raises(CheckpointError, match="feature_encoder_spec|conv_layers"):
        load_original(edited(goldens, "audio_base", tmp_path, modality__feature_encoder_spec=spec))


def test_namespace_instead_of_cfg(goldens, tmp_path):
    state = golden_state(goldens, "text_base")
    state["args"] = argparse.Namespace(**state.pop("cfg")["model"])
    front = load_original(tiny(tmp_path, state))[0].front
    assert front == TextFront(vocab_size=100, max_positions=64, dropout=0.0)


def test_enums_and_scalars_of_absent_packages_are_inert(goldens, tmp_path, monkeypatch):
    """A file written where fairseq was importable: enum members by value, dataclass types, numpy scalars."""
    module = types.ModuleType("examples.data2vec.data.modality")
    for name in ("examples", "examples.data2vec", "examples.data2vec.data"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.Modality = enum.Enum("Modality", {"AUDIO": 1, "IMAGE": 2, "TEXT": 3}, module=module.__name__)
    module.Data2VecMultiConfig = type("Data2VecMultiConfig", (), {"__module__": module.__name__})
    state = golden_state(goldens, "text_base")
    state["cfg"]["model"]["supported_modality"] = module.Modality.TEXT
    state["cfg"]["type"] = module.Data2VecMultiConfig
    state["extra_state"] = [np.float64(0.5), np.arange(3), {1}, torch.Size([2])]
    path = tiny(tmp_path, state)
    monkeypatch.undo()
    assert load_original(path)[0].modality == "text"

    state["cfg"]["model"]["supported_modality"] = "IMAGE"
    with pytest.raises(CheckpointError, match="supported_modality is 'IMAGE', supported is TEXT"):
        state["cfg"].pop("type")
        load_original(tiny(tmp_path, state))


def test_old_names_and_shapes(goldens, tmp_path):
    state = golden_state(goldens, "image_base")
    stem = "modality_encoders.IMAGE."
    for place in (state["model"], state["model"]["_ema"]):
        place[stem + "positional_encoder.pos_embed"] = place.pop(stem + "fixed_positional_encoder.positions")
        place[stem + "encoder_mask"] = place[stem + "alibi_bias"] = torch.zeros(1)
    _, tensors = load_original(tiny(tmp_path, state))
    assert set(tensors) == set(np.load(goldens / "weights_image_base.npz").files)

    state = golden_state(goldens, "audio_base")
    key = "modality_encoders.AUDIO.alibi_scale"
    want = {"": state["model"][key], "_ema.": state["model"]["_ema"][key]}
    for place in (state["model"], state["model"]["_ema"]):
        place[key] = place[key].squeeze(0)
        assert place[key].dim() == 4
    _, tensors = load_original(tiny(tmp_path, state))
    for prefix, tensor in want.items():
        assert torch.equal(tensors[prefix + key], tensor)


def test_fp16_students_and_views_of_one_storage(goldens, tmp_path):
    state = golden_state(goldens, "text_base")
    flat = torch.cat([t.half().reshape(-1) for k, t in state["model"].items() if k != "_ema"])
    start = 0
    for key, value in state["model"].items():
        if key != "_ema":
            state["model"][key] = flat[start : start + value.numel()].view(value.shape)
            start += value.numel()
    key = "blocks.0.mlp.fc1.weight"
    want = state["model"][key]
    state["model"][key] = want.t().contiguous().t()  # a transposed view keeps its values
    _, tensors = load_original(tiny(tmp_path, state))
    assert tensors[key].dtype == torch.float16 and tensors[key].is_contiguous()
    assert torch.equal(tensors[key], want)


@pytest.mark.parametrize("prefix", ["model.", "w2v_encoder.w2v_model."])
def test_fine_tuned_files_are_refused(goldens, tmp_path, prefix):
    state = golden_state(goldens, "image_base")
    state["model"] = {prefix + key: value for key, value in state["model"].items()}
    with pytest.raises(CheckpointError, match=r"fine-tuned checkpoint .* start with `(model|w2v_encoder)\.`"):
        load_original(tiny(tmp_path, state))


def test_missing_teacher_model_or_config(goldens, tmp_path):
    for part, match in (("model", "no `model` in it"), ("cfg", "no `model` section in its cfg")):
        state = golden_state(goldens, "image_base")
        del state[part]
        with pytest.raises(CheckpointError, match=match):
            load_original(tiny(tmp_path, state))
    state = golden_state(goldens, "image_base")
    del state["model"]["_ema"]
    with pytest.raises(CheckpointError, match="no `_ema`"):
        load_original(tiny(tmp_path, state))
    state = golden_state(goldens, "image_base")
    state["model"]["modality_encoders.TEXT.x"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"holds weights of \['IMAGE', 'TEXT'\]"):
        load_original(tiny(tmp_path, state))


@pytest.mark.parametrize(
    "broken", [{7: torch.zeros(1)}, {"_ema": torch.zeros(1)}, {"_ema": {7: torch.zeros(1)}}]
)
def test_weights_that_have_no_names_are_refused(goldens, tmp_path, broken):
    state = golden_state(goldens, "image_base")
    state["model"] |= broken
    with pytest.raises(CheckpointError, match=r"tiny\.pt: its `model` must hold tensors by name"):
        load_original(tiny(tmp_path, state))


def test_weights_that_all_lie_in_the_same_memory_are_refused(goldens, tmp_path):
    """Each becomes a copy, so a short file could fill any memory."""
    state = golden_state(goldens, "image_base")
    held = sum(t.numel() for key, t in state["model"].items() if key != "_ema")
    large = torch.zeros(10 * held)
    state["model"] |= {f"x.{i}": large[1:] for i in range(6)}
    with pytest.raises(CheckpointError, match=r"its weights have [\d,]+ values, of which it holds"):
        load_original(tiny(tmp_path, state))


def test_translate_names_a_missing_section():
    with pytest.raises(CheckpointError, match=r"no section model\.modalities\.audio"):
        translate({"model": {}}, {"modality_encoders.AUDIO.x": (1,)}, "x.pt")
