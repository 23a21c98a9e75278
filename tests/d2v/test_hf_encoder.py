"""`hf:FOLDER`: models of transformers under our probes; small ones of random weights, saved here."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from d2v.cli.main import main
from d2v.config.fronts import ImageFront, TextFront, WaveformFront
from d2v.config.recipes import recipe
from d2v.evaluate.features import token_features
from d2v.evaluate.scores import run_eval
from d2v.formats.open import load_run, open_encoder, open_model
from d2v.model.huggingface import HuggingFaceBackbone, HuggingFaceEncoder
from d2v.model.tuned import build_tuned
from d2v.train.finetune_step import lr_scale
from d2v.train.optim import param_groups
from tests.d2v.test_online_probe import stripes
from tests.d2v.test_resume import assert_same_run
from tests.d2v.tiny_runs import LINES, make_data, resume_finetune, run_finetune

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SPEECH = {**SMALL, "conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [5, 8],
          "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
          "num_conv_pos_embedding_groups": 2}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wav2vec 2.0": ("Wav2Vec2Config", "Wav2Vec2Model", SPEECH),
    "HuBERT": ("HubertConfig", "HubertModel", SPEECH),
    "WavLM": ("WavLMConfig", "WavLMModel", SPEECH),
    "ViT": ("ViTConfig", "ViTModel", {**SMALL, "image_size": 24, "patch_size": 4, "num_channels": 1}),
    "BERT": ("BertConfig", "BertModel", {**SMALL, "vocab_size": 64, "max_position_embeddings": 40}),
    "RoBERTa": ("RobertaConfig", "RobertaModel", {**SMALL, "vocab_size": 64, "max_position_embeddings": 42}),
}


def saved(name: str, folder: Path) -> Path:
    """A model of random weights, as `save_pretrained` writes it."""
    config, model, settings = MODELS[name]
    torch.manual_seed(0)
    getattr(transformers, model)(getattr(transformers, config)(**settings)).save_pretrained(folder)
    if name in ("BERT", "RoBERTa"):
        bert = name == "BERT"
        specials = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"] if bert else ["<s>", "<pad>", "</s>", "<unk>"]
        _tokenizer(folder, specials, 0 if bert else 1)
    return folder


def _tokenizer(folder: Path, specials: list[str], pad: int) -> None:
    """Words by spaces; the padding token has the id that the model's config says."""
    begin, padding, end, unknown = specials
    order = [padding, begin, end] if pad == 0 else [begin, padding, end]
    words = sorted({word for line in LINES for word in line.split()})
    ids = {word: i for i, word in enumerate([*order, unknown, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pad == 0:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}", pair=f"{begin}:0 $A:0 {end}:0 $B:1 {end}:1",
            special_tokens=[(begin, ids[begin]), (end, ids[end])],
        )  # fmt: skip
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token=begin, sep_token=end, pad_token=padding, unk_token=unknown
    ).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's own
@pytest.mark.parametrize("name", ["wav2vec 2.0", "HuBERT", "WavLM"])
def test_speech_gives_the_models_own_layers(name: str, tmp_path: Path) -> None:
    encoder, cfg, folder = open_encoder(f"hf:{saved(name, tmp_path)}")
    assert folder == tmp_path and isinstance(cfg.model.front, WaveformFront)
    wave = torch.randn(2, 4_000)
    with torch.no_grad():
        wanted = getattr(transformers, MODELS[name][1]).from_pretrained(tmp_path).eval()(wave)
        x, padding = token_features(encoder, wave, None, layer=-1, weights="student")
    torch.testing.assert_close(x, wanted.last_hidden_state)
    assert padding is None and x.shape[1] == cfg.model.front.frames(4_000)
    padded = torch.arange(4_000).expand(2, -1) >= torch.tensor([[4_000], [2_000]])
    x, padding = token_features(encoder, wave, padded, layer="all", weights="student")
    assert x.shape[2] == 32 and padding is not None
    assert padding.sum(1).tolist() == [0, x.shape[1] - cfg.model.front.frames(2_000)]


def test_pictures_and_their_normalisation(tmp_path: Path) -> None:
    saved("ViT", tmp_path)
    values = {"image_mean": [0.25], "image_std": [0.75]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    encoder, cfg, _ = open_encoder(f"hf:{tmp_path}")
    assert cfg.model.front == ImageFront(height=24, width=24, patch=4, channels=1, extra_tokens=1)
    assert (cfg.data.mean, cfg.data.std) == ((0.25,), (0.75,))
    pictures = torch.randn(2, 1, 24, 24)
    x, _ = token_features(encoder, pictures, None, layer=0, weights="student")
    with torch.no_grad():
        states = transformers.ViTModel.from_pretrained(tmp_path).eval()(pictures, output_hidden_states=True)
    torch.testing.assert_close(x, states.hidden_states[1])
    with pytest.raises(ValueError, match="weights must be student for a model of transformers"):
        token_features(encoder, pictures, None, layer=0, weights="teacher")


@pytest.mark.parametrize(("name", "data"), [("ViT", "digits"), ("wav2vec 2.0", "folder")])
def test_probe_and_extract(name: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(name, tmp_path / "model")
    path = stripes(tmp_path) if name == "ViT" else str(tmp_path / "sounds")
    if name != "ViT":
        for label in ("a", "b"):
            make_data("audio", tmp_path / "sounds" / label)
    assert main(["probe", f"hf:{tmp_path / 'model'}", "--data", path]) == 0
    said = capsys.readouterr().out
    assert "linear, features" in said and "most frequent class" in said
    out = str(tmp_path / "x.npz")
    assert main(["extract", f"hf:{tmp_path / 'model'}", "--data", path, "--out", out]) == 0
    found = np.load(out)["features"]
    assert found.shape[1] == 16 and np.isfinite(found).all()


def cut_and_pad(folder: Path) -> None:
    """As `save_pretrained` leaves a tokenizer whose last call cut and padded."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=30)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["BERT", "RoBERTa"])
def test_texts_are_read_in_the_models_own_tokens(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_and_pad(saved(name, tmp_path / "model"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for part in ("train", "test"):
        rows = [{"text": LINES[i % 4], "label": "ab"[i % 4 // 2]} for i in range(24)]
        (texts / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["probe", f"hf:{tmp_path / 'model'}", "--data", str(texts)]) == 0
    assert "linear, features" in capsys.readouterr().out
    from d2v.formats.hf_import import open_hf_texts

    encoder, cfg, _ = open_encoder(f"hf:{tmp_path / 'model'}")
    assert isinstance(cfg.model.front, TextFront) and cfg.model.front.max_positions == 40
    labelled = open_hf_texts(str(tmp_path / "model"), str(texts), cfg)
    source, padding, labels = next(labelled.splits["test"].batches(4))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer(LINES, add_special_tokens=False)["input_ids"]
    begin, end, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    rows = [[begin, *one, end] for one in ids]
    assert [row[row != pad].tolist() for row in source] == rows and labels.tolist() == [0, 0, 1, 1]
    x, found = token_features(encoder, source, padding, layer=-1, weights="student")
    shortest = min(range(4), key=lambda i: len(rows[i]))
    alone, _ = token_features(encoder, torch.tensor([rows[shortest]]), None, layer=-1, weights="student")
    assert found is not None and torch.equal(found, source == pad)
    torch.testing.assert_close(x[shortest, : len(rows[shortest])], alone[0], atol=1e-5, rtol=1e-5)
    out = ["extract", f"hf:{tmp_path / 'model'}", "--data", str(texts), "--out", str(tmp_path / "x.npz")]
    assert main(out) == 2
    assert "can be probed alone" in capsys.readouterr().err


def said(folder: Path) -> Path:
    """Speech with transcripts."""
    for part in ("train", "test"):
        make_data("audio", folder / part)
        for number, file in enumerate(sorted((folder / part).glob("*.wav"))):
            file.with_suffix(".txt").write_text("ab" if number % 2 else "ba")
    return folder


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's own
@pytest.mark.usefixtures("no_plots", "capturable")
@pytest.mark.parametrize("name", ["wav2vec 2.0", "HuBERT", "WavLM"])
def test_transcripts_are_learned_on_speech_models(name: str, tmp_path: Path) -> None:
    """The best score is found again by `d2v eval`, and a stopped run goes on bit for bit."""
    folder, data = saved(name, tmp_path / "model"), said(tmp_path / "said")
    given = recipe("speech_tiny")
    encoder, cfg, _ = open_encoder(f"hf:{folder}")
    tune = given.on("speech_tiny", cfg.model)
    train = dataclasses.replace(tune.train, steps=4, evaluate_every=2, layer_decay=0.5, log_every=1)
    data_config = dataclasses.replace(tune.data, batch=4)
    tune = dataclasses.replace(tune, train=train, data=data_config)
    whole = run_finetune(tune, f"hf:{folder}", str(data), tmp_path / "whole")
    assert whole.finished and set(whole.scores) == {"test/wer", "test/cer"}
    run_finetune(tune, f"hf:{folder}", str(data), tmp_path / "parts", stop=lambda step: step == 2)
    shutil.rmtree(folder)  # the run knows its architecture
    assert resume_finetune(tmp_path / "parts").finished
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    model, found, _ = load_run(tmp_path / "whole", step=4)
    assert isinstance(model.backbone, HuggingFaceBackbone) and found.transformers is not None
    assert not torch.equal(model.backbone.encoder.state_dict()["model.masked_spec_embed"], torch.zeros(16))
    assert run_eval(tmp_path / "whole", step=4) == whole.scores


def test_layers_learn_at_their_own_rates(tmp_path: Path) -> None:
    encoder, cfg, _ = open_encoder(f"hf:{saved('wav2vec 2.0', tmp_path)}")
    assert isinstance(encoder, HuggingFaceEncoder)
    tune = recipe("sound_tiny").on("sound_tiny", cfg.model)
    tune = dataclasses.replace(
        tune, transformers=encoder.architecture, head=dataclasses.replace(tune.head, outputs=2),
        train=dataclasses.replace(tune.train, layer_decay=0.5),
    )  # fmt: skip
    model = build_tuned(tune, tune.drop)
    scales = {
        id(p): group["lr_scale"]
        for group in param_groups(model, tune.optim, lr_scale(tune))
        for p in group["params"]
    }
    rates = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert {rate for name, rate in rates.items() if ".layers.0." in name} == {0.25}
    assert {rate for name, rate in rates.items() if ".layers.1." in name} == {0.5}
    assert {rate for name, rate in rates.items() if ".layers." not in name} == {1.0}
    model.freeze_front()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all("feature_extractor" in name for name in frozen)


def test_masks_reach_the_frames_and_channels(tmp_path: Path) -> None:
    encoder, cfg, _ = open_encoder(f"hf:{saved('wav2vec 2.0', tmp_path)}")
    assert isinstance(encoder, HuggingFaceEncoder)
    backbone = HuggingFaceBackbone(encoder.architecture, cfg.model)
    backbone.fill(encoder)
    wave = torch.randn(1, 2_000)
    plain, _ = backbone.eval()(wave)
    torch.testing.assert_close(plain, encoder.outputs(wave)[0][-1])
    time = torch.ones(1, plain.shape[1], dtype=torch.bool)
    one, two = (backbone(x, None, time)[0] for x in (wave, torch.randn(1, 2_000)))
    torch.testing.assert_close(one, two)  # every frame is the mask embedding
    channels = torch.ones(1, 16, dtype=torch.bool)
    one, two = (backbone(x, None, None, channels)[0] for x in (wave, torch.randn(1, 2_000)))
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one, plain, atol=1e-3)
    torch.testing.assert_close(backbone(wave)[0], plain)  # the hook is gone


def test_pictures_and_sentences_are_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("ViT", tmp_path / "vit")
    options = ["--train.steps", "2", "--train.evaluate-every", "2", "--data.batch", "8"]
    tune = ["finetune", f"hf:{tmp_path / 'vit'}", "--task", "classify", "--data", stripes(tmp_path)]
    assert main([*tune, *options, "--out", str(tmp_path / "a"), "--drop.path", "0.3"]) == 2
    said = capsys.readouterr().err
    assert said.endswith(
        "--drop.path has no effect for a model of transformers, whose dropouts are its own\n"
    )
    assert main([*tune, *options, "--out", str(tmp_path / "a")]) == 0
    assert main(["eval", str(tmp_path / "a")]) == 0
    assert "test/top1" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "hf"]) == 2
    assert "has an encoder of transformers" in capsys.readouterr().err

    texts = tmp_path / "texts"
    texts.mkdir()
    for part in ("train", "test"):
        rows = [{"text": LINES[i % 4], "label": "ab"[i % 4 // 2]} for i in range(24)]
        (texts / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("RoBERTa", "BERT"):
        folder, out = saved(name, tmp_path / name), str(tmp_path / f"{name}-run")
        tune = ["finetune", f"hf:{folder}", "--task", "sentence", "--data", str(texts)]
        assert main([*tune, *options, "--out", out, "--data.block", "24"]) == 0
        shutil.rmtree(folder)  # a run needs the folder no more
        assert main(["eval", out]) == 0
        assert "test/accuracy" in capsys.readouterr().out


def test_pairs_reach_bert_as_its_own_tokenizer_makes_them(tmp_path: Path) -> None:
    folder = saved("BERT", tmp_path / "model")
    cut_and_pad(folder)
    texts = tmp_path / "texts"
    texts.mkdir()
    for part in ("train", "test"):
        rows = [{"text": LINES[i % 4], "text2": LINES[(i + 1) % 4], "label": "ab"[i % 2]} for i in range(8)]
        (texts / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "run"
    tune = ["finetune", f"hf:{folder}", "--task", "sentence", "--data", str(texts), "--out", str(out)]
    assert main([*tune, "--train.steps", "1", "--train.evaluate-every", "1", "--data.batch", "4"]) == 0
    from d2v.data.tune import open_tune_data

    model, cfg, path = load_run(out)
    found = open_tune_data(path, cfg, device=torch.device("cpu"), encoder_dir=None, run_dir=out)
    source, padding, _ = next(iter(found.parts["test"].batches(4)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(
        LINES[:4], [*LINES[1:4], LINES[0]], return_tensors="pt", padding=True, return_token_type_ids=True
    )
    assert torch.equal(source, given["input_ids"]) and padding.any()
    assert given["token_type_ids"].any()
    encoder = model.backbone.encoder.eval()
    with torch.no_grad():
        theirs = encoder.model(**given).last_hidden_state
        ours = encoder.outputs(source, padding)[0][-1]
        without = encoder.model(**given | {"token_type_ids": given["token_type_ids"] * 0}).last_hidden_state
    real = ~padding
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(without[real], theirs[real], atol=1e-3)


@pytest.mark.parametrize("segments", [1, 2])
def test_roberta_knows_no_segments_whatever_its_table_holds(segments: int, tmp_path: Path) -> None:
    folder = saved("RoBERTa", tmp_path)
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_str(file.read_text())
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    file.write_text(tokenizer.to_str())
    config = transformers.RobertaConfig(**MODELS["RoBERTa"][2], type_vocab_size=segments, sep_token_id=2)
    model = transformers.RobertaModel(config).eval()
    model.save_pretrained(folder)
    encoder, _, _ = open_encoder(f"hf:{folder}")
    pair = torch.tensor([[0, 4, 2, 2, 5, 2]])
    with torch.no_grad():
        ours, theirs = encoder.outputs(pair)[0][-1], model(input_ids=pair).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no config.json"):
        open_encoder(f"hf:{tmp_path}")
    with pytest.raises(ValueError, match="one of our models is needed"):
        open_model(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    assert main(["probe", f"hf:{tmp_path}", "--data", "digits"]) == 2
    assert f"hf:{tmp_path}: " in capsys.readouterr().err
