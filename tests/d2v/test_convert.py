"""`d2v convert`: there and back bit for bit, what is refused, what is damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import d2v
from d2v.cli.main import main
from d2v.config.fronts import TextFront, WaveformFront
from d2v.config.model import ModelConfig
from d2v.config.presets import PRESETS, preset
from d2v.config.toml import CheckpointError
from d2v.config.tune import DropConfig, HeadConfig, tuned_model_config
from d2v.formats.convert import run_convert, save_folder, save_original
from d2v.formats.fairseq_config import original_config, translate
from d2v.formats.fairseq_names import FIELDS
from d2v.model import Data2Vec
from d2v.model.tuned import FineTuned
from d2v.train.pretrain import run
from tests.d2v.tiny_models import make_model, make_source
from tests.d2v.tiny_runs import make_data, tiny

FRONT = WaveformFront(conv_layers=((8, 10, 5), (8, 3, 2), (8, 2, 2)), position_groups=2, position_layers=2)


def moved(modality: str) -> Data2Vec:
    """A model whose teacher is not its student; speech reads waveforms."""
    model = make_model(modality, front=FRONT) if modality == "audio" else make_model(modality, cls_rows=None)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.1)
    return model.eval()


def assert_same(a: Data2Vec, b: Data2Vec) -> None:
    assert dataclasses.replace(a.cfg, init_std=b.cfg.init_std) == b.cfg
    one, two = a.state_dict(), b.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_there_and_back(modality: str, tmp_path: Path) -> None:
    model = moved(modality)
    save_original(model, tmp_path / "a.pt")
    assert_same(model, d2v.load(tmp_path / "a.pt"))  # type: ignore[arg-type]
    run_convert(tmp_path / "a.pt", tmp_path / "folder", "safetensors")
    assert_same(model, d2v.load(tmp_path / "folder"))  # type: ignore[arg-type]
    run_convert(tmp_path / "folder", tmp_path / "b.pt", "original")
    again = d2v.load(tmp_path / "b.pt")
    assert isinstance(again, Data2Vec)
    assert_same(model, again)
    source = make_source(modality)
    assert torch.equal(model.features(source).x, again.features(source).x)
    one, two = (torch.load(tmp_path / name) for name in ("a.pt", "b.pt"))
    assert one["cfg"] == two["cfg"] and one["model"].keys() == two["model"].keys()


def test_the_originals_file_keeps_its_keys_and_bits(goldens: Path, tmp_path: Path) -> None:
    given = goldens / "ckpt_image_base.pt"
    run_convert(given, tmp_path / "folder", "safetensors")
    run_convert(tmp_path / "folder", tmp_path / "back.pt", "original")
    assert_same(d2v.load(given), d2v.load(tmp_path / "back.pt"))  # type: ignore[arg-type]
    back = torch.load(tmp_path / "back.pt")["model"]
    expected = d2v.load(given).state_dict()
    flat = {
        **{k: v for k, v in back.items() if k != "_ema"},
        **{f"_ema.{k}": v for k, v in back["_ema"].items()},
    }
    assert flat.keys() == expected.keys()
    assert all(torch.equal(flat[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "audio_tiny"])
def test_every_preset_has_words_in_the_original(name: str) -> None:
    cfg = preset(name).model
    tree = original_config(cfg, shapes_of(cfg))
    assert tree["modalities"].keys() == {cfg.modality} and tree["depth"] == cfg.depth
    json.dumps(tree)  # plain containers


def shapes_of(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What a config is translated by: a name of the modality, and the tables of text."""
    prefix = f"modality_encoders.{cfg.modality.upper()}.local_encoder."
    if not isinstance(cfg.front, TextFront):
        return {f"{prefix}x": (1,)}
    tables = {"tokens": cfg.front.vocab_size, "positions": cfg.front.max_positions + 2}
    return {f"{prefix}embed_{name}.weight": (rows, cfg.dim) for name, rows in tables.items()}


def other(value: Any) -> Any:
    """Another value that the setting may have."""
    if isinstance(value, tuple):
        return value[:-1]
    if isinstance(value, bool):
        return not value
    return 2 * value or 1 if isinstance(value, int) else value / 2 if value else 0.25


@pytest.mark.parametrize("name", ["image_base", "audio_base", "text_base"])
def test_every_setting_of_the_table_goes_there_and_back(name: str) -> None:
    """One at a time, so that none stands at its default or for another."""
    given = preset(name).model
    given = dataclasses.replace(
        given, cls_rows=None, target=dataclasses.replace(given.target, top_k=4),
        front=dataclasses.replace(given.front, extra_tokens=1),
    )  # fmt: skip
    sections = ("", "modality", given.modality.upper(), "decoder")
    fields = {field for section in sections for field, _ in FIELDS[section].values()}
    fixed = {"image": {"decoder.projection_layers"}, "audio": set(), "text": {"mask.length"}}
    for field in sorted(fields - fixed[given.modality] - {"ema_encoder_only"}):
        part, _, key = field.rpartition(".")
        owner = getattr(given, part) if part else given
        new = other(getattr(owner, key))
        both = {"width": new} if field == "front.height" else {}
        changed: Any = dataclasses.replace(owner, **{key: new, **both})
        cfg = dataclasses.replace(given, **{part: changed}) if part else changed
        shapes = shapes_of(cfg)
        assert translate({"model": original_config(cfg, shapes)}, shapes, "x", quiet=True) == cfg, field


def test_runs_are_converted_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        tiny("text", steps=2, train={"save_every": 1}), make_data("text", tmp_path / "data"), tmp_path / "run"
    )
    source = str(tmp_path / "run")
    assert main(["convert", source, str(tmp_path / "one"), "--to", "safetensors", "--step", "1"]) == 0
    assert main(["convert", source, str(tmp_path / "two"), "--to", "safetensors"]) == 0
    assert (tmp_path / "two" / "tokenizer.json").is_file()
    first, newest = (d2v.load(tmp_path / name).state_dict() for name in ("one", "two"))
    assert not all(torch.equal(first[name], newest[name]) for name in first)
    assert_same(d2v.load(source), d2v.load(tmp_path / "two"))  # type: ignore[arg-type]
    assert (
        main(
            [
                "extract",
                str(tmp_path / "two"),
                "--data",
                str(tmp_path / "data"),
                "--out",
                str(tmp_path / "f.npz"),
            ]
        )
        == 0
    )
    (tmp_path / "f.npz").unlink()
    capsys.readouterr()
    for wrong, words in (
        ([source, str(tmp_path / "two"), "--to", "original"], "two exists already"),
        ([str(tmp_path / "none"), str(tmp_path / "x"), "--to", "original"], "none"),
        ([source, str(tmp_path / "x"), "--to", "timm"], "timm"),
    ):
        assert main(["convert", *wrong]) == 2 and words in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "one", "run", "two"]


def test_what_the_original_cannot_express_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the original has no log-mel front end"):
        save_original(make_model("audio"), tmp_path / "a.pt")
    front = dataclasses.replace(make_model("image").cfg.front, width=16)
    with pytest.raises(ValueError, match=r"the original cannot express front.width = 16"):
        save_original(make_model("image", front=front), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    save_folder(moved("image"), tmp_path / "a")
    weights, config = tmp_path / "a" / "model.safetensors", tmp_path / "a" / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged"):
        d2v.load(tmp_path / "a")
    weights.write_bytes(whole)
    config.write_text(text.replace('"dim": 16', '"dim": 32'))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        d2v.load(tmp_path / "a")
    for broken, words in (
        (text[:50], "not a converted model"),
        (text.replace("d2v-1", "d2v-9"), "format 'd2v-9', this version reads 'd2v-1'"),
        (text.replace('"depth"', '"deep"'), "unknown key 'deep'"),
        ('{"architectures": ["Bert"]}', "not a converted model: 'format'"),
    ):
        config.write_text(broken)
        with pytest.raises(CheckpointError, match=words):
            d2v.load(tmp_path / "a")
    config.write_text(text)
    assert_same(moved("image"), d2v.load(tmp_path / "a"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("modality", "task"), [("image", "classify"), ("audio", "ctc"), ("text", "sentence")]
)
def test_fine_tuned_models_as_files_of_the_original(modality: str, task: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FineTuned(tuned_model_config(moved(modality).cfg, DropConfig()), HeadConfig(task=task, outputs=3))
    save_original(model.eval(), tmp_path / "a.pt")
    back = d2v.load(tmp_path / "a.pt")
    assert isinstance(back, FineTuned) and back.head_cfg == model.head_cfg
    assert dataclasses.replace(model.cfg, init_std=back.cfg.init_std) == back.cfg
    mine, theirs = model.state_dict(), back.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(t, theirs[name]) for name, t in mine.items())
    source = make_source(modality)
    assert torch.equal(model.logits(source), back.logits(source))
    run_convert(tmp_path / "a.pt", tmp_path / "hf", "hf")
    assert isinstance(d2v.load(tmp_path / "hf"), FineTuned)


def test_the_original_classifies_no_sounds(tmp_path: Path) -> None:
    model = FineTuned(moved("audio").cfg, HeadConfig(task="classify", outputs=3))
    with pytest.raises(ValueError, match="the original has no classify of audio"):
        save_original(model, tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()
