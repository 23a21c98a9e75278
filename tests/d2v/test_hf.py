"""`d2v convert --to hf`: what transformers opens gives our outputs, and what was fine-tuned comes back."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import d2v
from d2v.cli.main import main
from d2v.config.fronts import LogMelFront
from d2v.config.objectives import for_objective
from d2v.config.toml import CheckpointError
from d2v.config.tune import HeadConfig
from d2v.formats.convert import run_convert, save_folder, save_original
from d2v.formats.hf_export import write_folder
from d2v.model import Data2Vec
from d2v.model.tuned import FineTuned
from d2v.train.pretrain import run
from tests.d2v.test_convert import FRONT, assert_same, moved
from tests.d2v.tiny_models import make_model, make_source
from tests.d2v.tiny_runs import make_data, tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_MODULES_CACHE"] = (
    tempfile.mkdtemp()
)  # transformers copies the code of a folder there to run it
transformers = pytest.importorskip("transformers")

INPUT = {"image": "pixel_values", "audio": "input_values", "text": "input_ids"}


def opened(folder: Path, kind: str = "AutoModel") -> Any:
    model, found = getattr(transformers, kind).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert {name: value for name, value in found.items() if value} == {}
    return model.eval()


def padded(modality: str) -> tuple[Tensor, Tensor | None]:
    """A batch whose second row is shorter, and its padding (True)."""
    source = make_source(modality, 2)
    if modality == "image":
        return source, None
    mask = torch.zeros(source.shape, dtype=torch.bool)
    mask[1, -source.shape[1] // 3 :] = True
    return source.masked_fill(mask, 1 if modality == "text" else 0), mask


@pytest.mark.parametrize("weights", ["student", "teacher"])
@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_encoders_give_our_features(modality: str, weights: str, tmp_path: Path) -> None:
    model = moved(modality)
    save_original(model, tmp_path / "a.pt")
    arguments = [str(tmp_path / "a.pt"), str(tmp_path / "hf"), "--to", "hf", "--weights", weights]
    assert main(["convert", *arguments]) == 0
    theirs = opened(tmp_path / "hf")
    source, padding = padded(modality)
    mask = None if padding is None else (~padding).long()
    with torch.no_grad():
        ours = model.features(source, padding, teacher=weights == "teacher").x
        out = theirs(**{INPUT[modality]: source}, attention_mask=mask, output_hidden_states=True)
    extra = model.cfg.front.extra_tokens
    torch.testing.assert_close(out.last_hidden_state[:, extra:], ours, atol=2e-5, rtol=1e-5)
    assert len(out.hidden_states) == 1 + model.cfg.prenet_depth + model.cfg.depth
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    other = model.features(source, padding, teacher=weights != "teacher").x
    assert not torch.allclose(out.last_hidden_state[:, extra:], other, atol=1e-3)
    assert_same(model, d2v.load(tmp_path / "hf"))  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_pretrained_folders_come_back_in_every_format(weights: str, tmp_path: Path) -> None:
    model = moved("text")
    save_original(model, tmp_path / "a.pt")
    there = ["convert", str(tmp_path / "a.pt"), str(tmp_path / "hf"), "--to", "hf", "--weights", weights]
    assert main(there) == 0
    for target, name in (("original", "b.pt"), ("safetensors", "folder"), ("hf", "again")):
        assert main(["convert", str(tmp_path / "hf"), str(tmp_path / name), "--to", target]) == 0
        assert_same(model, d2v.load(tmp_path / name))  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["data2vec1", "mae"])
def test_rivals_come_back(objective: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = d2v.model.build_model(for_objective(tiny("image"), objective).model).eval()  # type: ignore[attr-defined]
    write_folder(model, tmp_path)
    source = make_source("image", 2)
    with torch.no_grad():
        out = opened(tmp_path)(pixel_values=source).last_hidden_state[:, model.cfg.front.extra_tokens :]
        torch.testing.assert_close(out, model.features(source).x, atol=2e-5, rtol=1e-5)
    assert_same(model, d2v.load(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize("stack", [1, 2, 3])
def test_spectra_are_ours(stack: int, tmp_path: Path) -> None:
    front = LogMelFront(stack=stack, mels=20, position_groups=2, position_layers=2)
    model = make_model("audio", front=front).eval()
    write_folder(model, tmp_path)
    theirs = opened(tmp_path)
    for source, padding in (padded("audio"), (make_source("audio", 2)[:, :5000], None)):
        mask = None if padding is None else (~padding).long()
        with torch.no_grad():
            out = theirs(input_values=source, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(out, model.features(source, padding).x, atol=2e-5, rtol=1e-5)
    assert_same(model, d2v.load(tmp_path))  # type: ignore[arg-type]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.sampling_rate == 16_000


@pytest.mark.parametrize("heads", [3, 4])
def test_even_kernels_and_odd_numbers_of_heads(heads: int, tmp_path: Path) -> None:
    model = moved("audio")
    front = dataclasses.replace(FRONT, position_width=8, extra_tokens=1)
    cfg = dataclasses.replace(model.cfg, front=front, heads=heads, dim=24, prenet_depth=1)
    torch.manual_seed(0)
    model = Data2Vec(cfg).eval()
    with torch.no_grad():
        model.encoder.alibi_scale.copy_(torch.randn(heads).view(1, 1, heads, 1, 1))  # type: ignore[operator]
    write_folder(model, tmp_path)
    source, padding = padded("audio")
    assert padding is not None
    with torch.no_grad():
        out = opened(tmp_path)(input_values=source, attention_mask=(~padding).long()).last_hidden_state
        torch.testing.assert_close(out[:, 1:], model.features(source, padding).x, atol=2e-5, rtol=1e-5)


def tuned(modality: str, head: HeadConfig) -> FineTuned:
    torch.manual_seed(0)
    model = FineTuned(moved(modality).cfg, head)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


HEADS: dict[str, tuple[str, HeadConfig, str]] = {
    "pictures": ("image", HeadConfig(task="classify", outputs=5), "AutoModelForImageClassification"),
    "sounds": ("audio", HeadConfig(task="classify", outputs=3), "AutoModelForAudioClassification"),
    "ctc": ("audio", HeadConfig(task="ctc", outputs=7), "AutoModelForCTC"),
    "sentence": ("text", HeadConfig(task="sentence", outputs=2), "AutoModelForSequenceClassification"),
    "regression": (
        "text",
        HeadConfig(task="sentence", outputs=1, regression=True),
        "AutoModelForSequenceClassification",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_fine_tuned_models_give_our_logits_and_come_back(case: str, tmp_path: Path) -> None:
    modality, head, kind = HEADS[case]
    model = tuned(modality, head)
    (tmp_path / "hf").mkdir()
    write_folder(model, tmp_path / "hf")
    theirs = opened(tmp_path / "hf", kind)
    source, padding = padded(modality)
    given = {INPUT[modality]: source}
    if padding is not None:
        given["attention_mask"] = (~padding).long()
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(**given).logits, model.logits(source, padding), atol=2e-5, rtol=1e-5
        )
    back = d2v.load(tmp_path / "hf")
    assert isinstance(back, FineTuned) and (back.cfg, back.head_cfg) == (model.cfg, model.head_cfg)
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in model.state_dict().items())
    save_folder(back, tmp_path / "folder")
    again = d2v.load(tmp_path / "folder")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


def test_labels_come_back(tmp_path: Path) -> None:
    save_folder(tuned("audio", HEADS["ctc"][1]), tmp_path / "a")
    given = {"labels.json": '["<s>", "<pad>", "</s>", "<unk>", "|", "a", "b"]\n', "vocabulary.json": "{}\n"}
    for name, text in given.items():
        (tmp_path / "a" / name).write_text(text)
    run_convert(tmp_path / "a", tmp_path / "hf", "hf")
    run_convert(tmp_path / "hf", tmp_path / "b", "safetensors")
    assert {name: (tmp_path / "b" / name).read_text() for name in given} == given


@pytest.mark.parametrize("case", ["pictures", "ctc", "regression"])
def test_losses_have_gradients(case: str, tmp_path: Path) -> None:
    modality, head, kind = HEADS[case]
    write_folder(tuned(modality, head), tmp_path)
    source, padding = padded(modality)
    labels = {"pictures": torch.tensor([1, 4]), "ctc": torch.tensor([[1, 2, -100], [3, 3, 5]]),
              "regression": torch.tensor([0.5, 2.0])}[case]  # fmt: skip
    given = {INPUT[modality]: source, "labels": labels}
    if padding is not None:
        given["attention_mask"] = (~padding).long()
    model = opened(tmp_path, kind)
    model(**given).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_runs_bring_their_preprocessors(tmp_path: Path) -> None:
    for modality in ("image", "text"):
        data = make_data(modality, tmp_path / f"{modality}-data")
        run(tiny(modality, steps=1), data, tmp_path / modality)
        assert (
            main(["convert", str(tmp_path / modality), str(tmp_path / f"{modality}-hf"), "--to", "hf"]) == 0
        )
    pictures = json.loads((tmp_path / "image-hf" / "preprocessor_config.json").read_text())
    measured = json.loads((tmp_path / "image" / "data.json").read_text())["meta"]
    assert (pictures["image_mean"], pictures["image_std"]) == (measured["mean"], measured["std"])
    assert pictures["size"] == {"height": 24, "width": 24}
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "image-hf", trust_remote_code=True)
    picture = np.random.default_rng(0).integers(0, 255, (24, 24, 1), dtype=np.uint8)
    made = processor(picture, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    wanted = (torch.from_numpy(picture[..., 0]) / 255 - measured["mean"][0]) / measured["std"][0]
    torch.testing.assert_close(made[0, 0], wanted, atol=1e-5, rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "text-hf")
    ids = tokenizer("the cat sat", "on the mat")["input_ids"]
    assert ids[0] == 0 and ids.count(2) == 3 and ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat saton the mat"
    batch = tokenizer(["the cat", "a mat and a cat"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert opened(tmp_path / "text-hf")(**batch).last_hidden_state.shape == (*batch["input_ids"].shape, 16)


def test_ctc_brings_its_letters(tmp_path: Path) -> None:
    letters = ["<s>", "<pad>", "</s>", "<unk>", "|", "a", "b"]
    write_folder(tuned("audio", HEADS["ctc"][1]), tmp_path, labels=letters)
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode([5, 5, 0, 5, 4, 6, 0, 0]) == "aa b"
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    made = extractor(
        [np.ones(400), np.arange(300.0)], sampling_rate=16_000, padding=True, return_tensors="pt"
    )
    assert made["input_values"].shape == made["attention_mask"].shape == (2, 400)
    assert made["attention_mask"].sum(1).tolist() == [400, 300]


def test_labels_are_named(tmp_path: Path) -> None:
    write_folder(tuned("image", HEADS["pictures"][1]), tmp_path, labels=list("abcde"))
    assert opened(tmp_path, HEADS["pictures"][2]).config.id2label == dict(enumerate("abcde"))


def test_the_folder_runs_without_this_package(tmp_path: Path) -> None:
    write_folder(moved("image"), tmp_path)
    code = (
        "import sys, torch, transformers\n"
        "sys.modules.update(d2v=None, d2vkern=None)\n"
        f"m = transformers.AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        f"p = transformers.AutoImageProcessor.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "given = p(torch.zeros(1, 30, 40), return_tensors='pt')\n"
        "print(tuple(m(**given).last_hidden_state.shape))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "m")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.stdout.strip() == "(1, 37, 16)", done.stderr


@pytest.mark.parametrize(
    ("make", "weights", "message"),
    [
        (
            lambda: tuned("image", HEADS["pictures"][1]),
            "teacher",
            "weights must be student for a fine-tuned model",
        ),
        (
            lambda: d2v.model.build_model(for_objective(tiny("image"), "mae").model),  # type: ignore[attr-defined]
            "teacher",
            "weights must be student for objective mae",
        ),
    ],
)
def test_what_a_folder_cannot_hold(
    make: Callable[[], Any], weights: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_folder(make(), tmp_path, weights=weights)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_d2v_does_not_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = moved("image")
    save_original(model, tmp_path / "a.pt")
    alone = ["convert", str(tmp_path / "a.pt"), str(tmp_path / "alone"), "--to", "hf", "--encoder-only"]
    assert main(alone) == 0
    assert opened(tmp_path / "alone").config.modality == "image"
    with pytest.raises(CheckpointError, match="holds an encoder alone, for transformers"):
        d2v.load(tmp_path / "alone")
    write_folder(model, tmp_path / "alone")
    rest = tmp_path / "alone" / "pretraining.safetensors"
    whole = rest.read_bytes()
    rest.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"pretraining.safetensors: damaged"):
        d2v.load(tmp_path / "alone")
    rest.write_bytes(whole)
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    config["d2v"]["weights"] = "both"
    (tmp_path / "alone" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="weights must be student or teacher, got 'both'"):
        d2v.load(tmp_path / "alone")
    config["d2v"]["weights"] = "teacher"  # names of the student's tensors are then in both files
    (tmp_path / "alone" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="missing"):
        d2v.load(tmp_path / "alone")
    (tmp_path / "tuned").mkdir()
    write_folder(tuned("image", HEADS["pictures"][1]), tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    config["d2v"]["head"]["outputs"] = 10**7  # 640 MB, were it made before the shapes are compared
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="2 wrong shape: head.weight"):
        d2v.load(tmp_path / "tuned")
    wrong = [
        "convert",
        str(tmp_path / "a.pt"),
        str(tmp_path / "b"),
        "--to",
        "safetensors",
        "--weights",
        "teacher",
    ]
    assert main(wrong) == 2
    assert "weights are chosen for hf alone" in capsys.readouterr().err
    assert main([*wrong[:-2], "--encoder-only"]) == 2
    assert "encoder_only is for hf alone" in capsys.readouterr().err
