"""What is read of a folder of transformers: layers, precision, preprocessors; and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from d2v.cli.main import main
from d2v.config.fronts import ImageFront, WaveformFront
from d2v.config.toml import CheckpointError
from d2v.config.tune import HeadConfig
from d2v.data.open import open_data
from d2v.data.speech.reading import resample
from d2v.evaluate.features import token_features
from d2v.formats.hf_export import write_folder
from d2v.formats.open import load_run, open_encoder
from d2v.model.huggingface import HuggingFaceBackbone, HuggingFaceEncoder
from d2v.model.tuned import FineTuned
from tests.d2v.test_convert import moved
from tests.d2v.test_hf_encoder import MODELS, SMALL, SPEECH, saved
from tests.d2v.test_online_probe import stripes
from tests.d2v.tiny_models import make_source
from tests.d2v.tiny_runs import make_data, resume_finetune

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

PICTURES = MODELS["ViT"][2]
STABLE = {**SPEECH, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
TEXT = {**SMALL, "vocab_size": 64, "max_position_embeddings": 42}
FAMILIES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "ViT": ("ViT", PICTURES, "layernorm"),
    "DeiT": ("DeiT", PICTURES, "layernorm"),
    "DINOv2": ("Dinov2", PICTURES, "layernorm"),
    "DINOv2 with registers": ("Dinov2WithRegisters", PICTURES, "layernorm"),
    "MAE": ("ViTMAE", PICTURES, "layernorm"),
    "BEiT": ("Beit", PICTURES, None),
    "data2vec 1, pictures": ("Data2VecVision", PICTURES, None),
    "wav2vec 2.0": ("Wav2Vec2", SPEECH, None),
    "wav2vec 2.0, stable": ("Wav2Vec2", STABLE, "encoder.layer_norm"),
    "HuBERT": ("Hubert", SPEECH, None),
    "HuBERT, stable": ("Hubert", STABLE, "encoder.layer_norm"),
    "WavLM": ("WavLM", SPEECH, None),
    "WavLM, stable": ("WavLM", STABLE, "encoder.layer_norm"),
    "data2vec 1, speech": ("Data2VecAudio", {**SPEECH, "num_conv_pos_embeddings": 2}, None),
    "BERT": ("Bert", TEXT, None),
    "RoBERTa": ("Roberta", TEXT, None),
    "data2vec 1, text": ("Data2VecText", TEXT, None),
}
"""family -> transformers' name of it, its settings, and the norm after its last block"""
GROUP = ("wav2vec 2.0", "data2vec 1, speech")


def made(family: str, folder: Path) -> tuple[HuggingFaceEncoder, nn.Module, Tensor]:
    """Our encoder of a saved model whose norms are no identities, transformers' own, and two samples."""
    name, settings, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, 0.5, 0.5)
    model.save_pretrained(folder)
    encoder, cfg, _ = open_encoder(f"hf:{folder}")
    assert isinstance(encoder, HuggingFaceEncoder)
    samples = {
        "image": torch.randn(2, 1, 24, 24),
        "audio": torch.randn(2, 2_000),
        "text": torch.randint(4, 60, (2, 9)),
    }
    theirs = getattr(transformers, f"{name}Model").from_pretrained(folder).eval()
    if family == "MAE":
        theirs.config.mask_ratio = 0.0
    return encoder, theirs, samples[cfg.model.modality]


def theirs_of(model: Any, source: Tensor, **more: Any) -> Any:
    """What the model itself gives."""
    if hasattr(model.config, "mask_ratio"):
        more["noise"] = torch.arange(36.0).expand(len(source), -1)
    return model(source, **more)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's own
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_the_models_own_output(family: str, tmp_path: Path) -> None:
    """In probes and, with the norm after the last block in the gradient, in fine-tuning."""
    encoder, theirs, source = made(family, tmp_path)
    with torch.no_grad():
        gives = theirs_of(theirs, source, output_hidden_states=True)
        outputs, _ = encoder.outputs(source)
        last, _ = encoder.last(source)
    torch.testing.assert_close(outputs[-1], gives.last_hidden_state)
    torch.testing.assert_close(last, gives.last_hidden_state)
    torch.testing.assert_close(outputs[0], gives.hidden_states[1])
    x, _ = token_features(encoder, source, None, layer="mean", weights="student")
    torch.testing.assert_close(x, (gives.hidden_states[1] + gives.last_hidden_state) / 2)

    backbone = HuggingFaceBackbone(encoder.architecture, encoder.cfg)
    backbone.fill(encoder)
    x, _ = backbone.eval()(source)
    torch.testing.assert_close(x, gives.last_hidden_state)
    x.square().sum().backward()
    theirs_of(theirs, source).last_hidden_state.square().sum().backward()
    fixed = {name for name, p in backbone.encoder.model.named_parameters() if not p.requires_grad}
    assert fixed <= {"embeddings.position_embeddings"}  # MAE's sines and cosines
    own = dict(theirs.named_parameters())
    wanted = {name: p.grad for name, p in own.items() if p.grad is not None and name not in fixed}
    found = {name: p.grad for name, p in backbone.encoder.model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4)
    if (norm := FAMILIES[family][2]) is not None:
        assert found[f"{norm}.weight"].abs().min() > 0  # type: ignore[union-attr]


def test_every_patch_reaches_mae_in_its_place(tmp_path: Path) -> None:
    encoder, theirs, source = made("MAE", tmp_path)
    assert isinstance(encoder.cfg.front, ImageFront) and encoder.cfg.front.extra_tokens == 1
    seen: list[Tensor] = []
    embeddings = encoder.model.get_submodule("embeddings")
    embeddings.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    backbone = HuggingFaceBackbone(encoder.architecture, encoder.cfg)
    backbone.fill(encoder)
    with torch.no_grad():
        encoder.outputs(source)
        patches = embeddings.patch_embeddings(source) + embeddings.position_embeddings[:, 1:]  # type: ignore[operator, index]
        one, two = backbone.train()(source)[0], backbone(source)[0]
    torch.testing.assert_close(seen[0][:, 1:], patches)
    assert torch.equal(one, two)  # nothing is masked by chance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folders_open_in_fp32(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they were saved in; bf16 is what train.precision makes of it."""
    folder = tmp_path / "model"
    model = transformers.ViTModel(transformers.ViTConfig(**PICTURES)).to(dtype)
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text()).get("dtype", "").endswith(str(dtype)[6:])
    encoder, cfg, _ = open_encoder(f"hf:{folder}")
    assert {t.dtype for t in [*encoder.parameters(), *encoder.buffers()]} == {torch.float32}
    for name, t in model.named_parameters():
        assert torch.equal(encoder.model.get_parameter(name), t.float())
    data = stripes(tmp_path)
    if dtype == torch.float16:
        assert main(["probe", f"hf:{folder}", "--data", data]) == 0
        return
    tune = ["finetune", f"hf:{folder}", "--task", "classify", "--data", data, "--out", str(tmp_path / "run")]
    assert main([*tune, "--train.steps", "1", "--data.batch", "8", "--train.precision", "bf16"]) == 0
    tuned, _, _ = load_run(tmp_path / "run")
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}

    config = tmp_path / "run" / "config.toml"  # as if another release had named the weights
    config.write_text(config.read_text().replace(transformers.__version__, "4.0.0"))
    load_run(tmp_path / "run")
    monkeypatch.setattr(HuggingFaceBackbone, "state_dict", lambda self, **more: {})
    said = rf"transformers 4.0.0, this is {transformers.__version__}, whose names may differ"
    with pytest.raises(CheckpointError, match=said):
        load_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match=said):
        resume_finetune(tmp_path / "run")


def preprocessor(folder: Path, *, nested: bool = False, **values: Any) -> Any:
    """Write the feature extractor of a folder, as it is or as transformers 5 saves a processor; return it."""
    extractor = transformers.Wav2Vec2FeatureExtractor(**values)
    if nested:
        file, known = "processor_config.json", {"feature_extractor": extractor.to_dict()}
    else:
        file, known = "preprocessor_config.json", extractor.to_dict()
    (folder / file).write_text(json.dumps(known))
    return extractor


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("rate", "nested"), [(8_000, True), (16_000, False)])
def test_waveforms_are_what_the_preprocessor_makes(
    rate: int, normalised: bool, nested: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved("wav2vec 2.0", tmp_path / "model")
    extractor = preprocessor(folder, nested=nested, sampling_rate=rate, do_normalize=normalised)
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    wave = np.random.default_rng(0).normal(0.1, 2e-3, 16_000).astype(np.float32)  # faint: eps counts
    soundfile.write(sounds / "a.wav", wave, 16_000, subtype="FLOAT")
    _, cfg, _ = open_encoder(f"hf:{folder}")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{rate:,} Hz" in said and "resampled" in said
    assert ("is not normalised" in said) != normalised
    assert isinstance(cfg.model.front, WaveformFront) and cfg.model.front.sample_rate == rate
    ((_, batch),) = open_data(str(sounds), cfg, purpose="eval").in_order(1)
    wanted = extractor(resample(wave, 16_000, rate), sampling_rate=rate).input_values[0]
    np.testing.assert_allclose(batch.source[0].numpy(), wanted, rtol=1e-3, atol=1e-4 if normalised else 1e-7)


def test_without_a_preprocessor_speech_is_read_as_its_class_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, cfg, _ = open_encoder(f"hf:{saved('wav2vec 2.0', tmp_path)}")
    default = transformers.Wav2Vec2FeatureExtractor()
    assert isinstance(cfg.model.front, WaveformFront)
    assert cfg.model.front.sample_rate == default.sampling_rate
    assert (cfg.data.wave_norm == "transformers") == default.do_normalize
    assert "preprocessor_config.json is missing" in capsys.readouterr().out


@pytest.mark.parametrize("values", [
    {"sampling_rate": "16k"}, {"sampling_rate": 0}, {"sampling_rate": True}, {"do_normalize": "yes"}
])  # fmt: skip
def test_a_preprocessor_of_nonsense_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    saved("wav2vec 2.0", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"hf:.*: its preprocessor's {next(iter(values))} must be"):
        open_encoder(f"hf:{tmp_path}")
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"hf:.*: preprocessor_config.json: no JSON"):
        open_encoder(f"hf:{tmp_path}")


def test_8_khz_models_are_probed_and_trained(tmp_path: Path) -> None:
    """The run remembers how waveforms are read."""
    folder = saved("wav2vec 2.0", tmp_path / "model")
    preprocessor(folder, sampling_rate=8_000, do_normalize=False)
    for label in ("a", "b"):
        make_data("audio", tmp_path / "sounds" / label)
    data = str(tmp_path / "sounds")
    assert main(["probe", f"hf:{folder}", "--data", data]) == 0
    tune = ["finetune", f"hf:{folder}", "--task", "classify", "--data", data, "--out", str(tmp_path / "run")]
    assert main([*tune, "--train.steps", "1", "--data.batch", "20"]) == 0
    tuned, cfg, _ = load_run(tmp_path / "run")
    assert cfg.data.wave_norm == "none"
    assert isinstance(tuned.cfg.front, WaveformFront) and tuned.cfg.front.sample_rate == 8_000


@pytest.mark.parametrize("family", GROUP)
def test_features_do_not_see_the_padding_of_a_batch(family: str, tmp_path: Path) -> None:
    """Group norm, and positions of several convolutions: utterances pass one at a time."""
    encoder, _, source = made(family, tmp_path)
    assert isinstance(encoder.cfg.front, WaveformFront)
    padding = torch.arange(2_000).expand(3, -1) >= torch.tensor([[2_000], [900], [20]])
    source = torch.cat([source, source[:1]]).masked_fill(padding, 0.0)
    backbone = HuggingFaceBackbone(encoder.architecture, encoder.cfg)
    backbone.fill(encoder)
    tuned = FineTuned(encoder.cfg, HeadConfig(task="ctc", outputs=5), backbone=backbone)
    with torch.no_grad():
        outputs, padded = encoder.outputs(source, padding)
        alone, _ = encoder.outputs(source[1:2, :900])
        logits, whole = tuned.eval().logits(source[1:2, :900]), tuned.logits(source, padding)
    frames = encoder.cfg.front.frames(900)
    assert padded is not None
    assert (~padded).sum(1).tolist() == [encoder.cfg.front.frames(2_000), frames, 0]
    for one, of_batch in zip(alone, outputs, strict=True):
        torch.testing.assert_close(of_batch[1, :frames], one[0])
    torch.testing.assert_close(whole[1, :frames], logits[0])


@pytest.mark.parametrize("masked", [None, False, True])
@pytest.mark.parametrize("family", ["wav2vec 2.0", "wav2vec 2.0, stable"])
def test_batches_of_training_are_padded_as_transformers_pads_them(
    family: str, masked: bool | None, tmp_path: Path
) -> None:
    """With an attention mask where the preprocessor returns one; group norm has none if no file says."""
    encoder, theirs, source = made(family, tmp_path)
    if masked is not None:
        preprocessor(tmp_path, return_attention_mask=masked)
        encoder, _, _ = open_encoder(f"hf:{tmp_path}")  # type: ignore[assignment]
    backbone = HuggingFaceBackbone(encoder.architecture, encoder.cfg)
    backbone.fill(encoder)
    for module in backbone.modules():  # training, without its dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    backbone.train()
    backbone.encoder.model.eval()
    padding = torch.arange(2_000).expand(2, -1) >= torch.tensor([[2_000], [900]])
    source = source.masked_fill(padding, 0.0)
    mask = (~padding).long() if masked or (masked is None and "stable" in family) else None
    with torch.no_grad():
        x, padded = backbone(source, padding)
        wanted = theirs(source, attention_mask=mask).last_hidden_state
        other = theirs(source, attention_mask=(~padding).long() if mask is None else None).last_hidden_state
    assert padded is not None
    real = ~padded
    torch.testing.assert_close(x[real], wanted[real])
    assert not torch.allclose(x[real], other[real], atol=1e-3)


def test_pictures_have_the_size_that_the_preprocessor_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, theirs, _ = made("DINOv2", tmp_path)
    values = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 12}}
    values |= {"image_mean": [0.25], "image_std": [0.5], "rescale_factor": 1 / 127.5}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    encoder, cfg, _ = open_encoder(f"hf:{tmp_path}")  # type: ignore[assignment]
    assert cfg.model.front == ImageFront(height=16, width=12, patch=4, channels=1, extra_tokens=1)
    np.testing.assert_allclose([*cfg.data.mean, *cfg.data.std], [0.125, 0.25])  # type: ignore[misc]
    assert "16 x 12 pixels" in capsys.readouterr().out
    source = torch.randn(2, 1, 16, 12)
    with torch.no_grad():
        torch.testing.assert_close(encoder.outputs(source)[0][-1], theirs(source).last_hidden_state)

    for wrong, said in (
        ({"do_flip_channel_order": True}, "do_flip_channel_order is not supported"),
        ({"size": 10**9}, "a picture's side must be at most"),
        ({"size": {"width": 16}}, "size must be a positive whole number, got None"),
        ({"size": 18}, "front.height must be a positive multiple of patch 4"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=rf"^hf:.*{said}"):
            open_encoder(f"hf:{tmp_path}")

    vit = saved("ViT", tmp_path / "vit")  # whose positions are of one size
    (vit / "preprocessor_config.json").write_text(json.dumps({"size": 16}))
    with pytest.raises(ValueError, match=r"^hf:.*: it does not read 16 x 16 pixels: .*[^\n]*$"):
        open_encoder(f"hf:{vit}")
    (vit / "preprocessor_config.json").write_text(json.dumps({"size": 24, "do_normalize": False}))
    _, cfg, _ = open_encoder(f"hf:{vit}")
    assert (cfg.data.mean, cfg.data.std) == ((0.0,), (1.0,))


def test_the_class_token_comes_before_registers(tmp_path: Path) -> None:
    encoder, theirs, _ = made("DINOv2 with registers", tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    data, out = stripes(tmp_path / "pictures"), tmp_path / "x.npz"
    assert (
        main(["extract", f"hf:{tmp_path / 'model'}", "--data", data, "--out", str(out), "--pool", "cls"]) == 0
    )
    _, cfg, _ = open_encoder(f"hf:{tmp_path / 'model'}")
    (_, batch), *_ = open_data(data, cfg, purpose="eval").in_order(4)
    with torch.no_grad():
        wanted = theirs(batch.source).last_hidden_state[:, 0]
    np.testing.assert_allclose(np.load(out)["features"][:4], wanted.numpy(), rtol=1e-4, atol=1e-5)


CODE = "import pathlib\npathlib.Path({marker!r}).write_text('run')\nclass A: pass\n"


def asks(prompt: str = "") -> str:
    raise AssertionError(f"a question was asked: {prompt}")


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_folder_is_neither_run_nor_asked_about(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", asks)
    folder, marker = saved("BERT", tmp_path / "model"), tmp_path / "ran"
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    for name, value in (
        ("config.json", {"AutoConfig": "code.A", "AutoModel": "code.A"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["code.A", "code.A"]}),
    ):
        values = json.loads((folder / name).read_text())
        values["auto_map"] = value
        if not known:
            values["model_type"] = "their_own"
        (folder / name).write_text(json.dumps(values))
    data = tmp_path / "texts"
    data.mkdir()
    for part in ("train", "test"):
        lines = [{"text": "a b c", "label": "ab"[i % 2]} for i in range(8)]
        (data / f"{part}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    capsys.readouterr()
    code = main(["probe", f"hf:{folder}", "--data", str(data)])
    said = capsys.readouterr().err
    assert not marker.exists()
    if known:
        assert code == 0, said
    else:
        assert code == 2 and said.count("\n") == 1
        assert "'their_own' needs code of the folder's own (auto_map of its config.json)" in said


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_folders_we_exported_open_as_ours(
    modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", asks)
    model = moved(modality)
    write_folder(model, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    found, cfg, folder = open_encoder(f"hf:{tmp_path}")
    assert type(found) is type(model) and cfg.model == model.cfg and folder == tmp_path
    source = make_source(modality, 2)
    with torch.no_grad():
        assert torch.equal(found.outputs(source)[0][-1], model.outputs(source)[0][-1])
