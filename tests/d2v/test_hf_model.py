"""A folder's model as users of transformers meet it: silent loading, training, 16 bits, saving, pipelines."""

from __future__ import annotations

import copy
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from d2v.config.tune import HeadConfig
from d2v.data.text.tokenizer import train_tokenizer
from d2v.formats.hf_export import write_folder
from d2v.model.feature_encoder import sincos_positions
from d2v.model.tuned import FineTuned
from tests.d2v.tiny_models import make_model, make_source
from tests.d2v.tiny_runs import LINES, tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp())
transformers = pytest.importorskip("transformers")

LETTERS = ["<s>", "<pad>", "</s>", "<unk>", "|", "A", "B"]
KINDS: dict[str, tuple[str, HeadConfig | None, str]] = {
    "image": ("image", None, "AutoModel"),
    "audio": ("audio", None, "AutoModel"),
    "text": ("text", None, "AutoModel"),
    "pictures": ("image", HeadConfig(task="classify", outputs=3), "AutoModelForImageClassification"),
    "sounds": ("audio", HeadConfig(task="classify", outputs=3), "AutoModelForAudioClassification"),
    "ctc": ("audio", HeadConfig(task="ctc", outputs=7), "AutoModelForCTC"),
    "sentence": ("text", HeadConfig(task="sentence", outputs=3), "AutoModelForSequenceClassification"),
    "number": (
        "text",
        HeadConfig(task="sentence", outputs=1, regression=True),
        "AutoModelForSequenceClassification",
    ),
}  # fmt: skip
READERS = {
    "image": ("AutoImageProcessor", "AutoProcessor"),
    "audio": ("AutoFeatureExtractor", "AutoProcessor"),
    "text": ("AutoTokenizer", "AutoProcessor"),
}
LABELS = {
    "pictures": torch.tensor([0, 2]),
    "sounds": torch.tensor([1, 2]),
    "ctc": torch.tensor([[5, 6, -100], [6, 6, 5]]),
    "sentence": torch.tensor([2, 0]),
    "number": torch.tensor([0.5, 2.0]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    train_tokenizer(iter(LINES), 300).save(str(root / "tokenizer.json"))
    for kind, (modality, head, _) in KINDS.items():
        (root / kind).mkdir()
        torch.manual_seed(0)
        model = make_model(modality) if head is None else FineTuned(tiny(modality).model, head)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        labels = None if head is None else LETTERS if kind == "ctc" else ["cat", "dog", "hen"][: head.outputs]
        tokenizer = root / "tokenizer.json" if modality == "text" else None
        write_folder(model, root / kind, labels=labels, tokenizer=tokenizer)
    return {kind: root / kind for kind in KINDS}


def opened(folder: Path, kind: str, **options: Any) -> Any:
    return getattr(transformers, KINDS[kind][2]).from_pretrained(folder, trust_remote_code=True, **options)


def inputs(kind: str) -> dict[str, Tensor]:
    modality = KINDS[kind][0]
    source = make_source(modality, 2)
    if modality == "image":
        return {"pixel_values": source}
    mask = torch.ones_like(source, dtype=torch.long)
    mask[1, -source.shape[1] // 3 :] = 0
    source = source.masked_fill(mask == 0, 1 if modality == "text" else 0)
    return {"input_ids" if modality == "text" else "input_values": source, "attention_mask": mask}


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What transformers logs as warnings and errors; pytest turns Python's warnings into errors."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_says_nothing(kind: str, folders: dict[str, Path], said: list[str], tmp_path: Path) -> None:
    model = opened(folders[kind], kind)
    modality = KINDS[kind][0]
    assert model.main_input_name == next(iter(inputs(kind)))
    readers = [
        getattr(transformers, name).from_pretrained(folders[kind], trust_remote_code=True)
        for name in READERS[modality]
    ]
    code = [file.read_text(encoding="utf-8") for file in folders[kind].glob("*.py")]
    assert len(code) >= 3 and not re.search(r"^\s*(from|import) (\.\.|d2v)", "\n".join(code), re.MULTILINE)
    model.save_pretrained(tmp_path)
    readers[-1].save_pretrained(tmp_path)
    again = opened(tmp_path, kind)
    for name in READERS[modality]:
        getattr(transformers, name).from_pretrained(tmp_path, trust_remote_code=True)
    assert said == []
    with torch.no_grad():
        assert torch.equal(again(**inputs(kind))[0], model(**inputs(kind))[0])


@pytest.mark.parametrize("kind", ["pictures", "ctc", "sentence"])
def test_checkpointing_gives_the_same_gradients(kind: str, folders: dict[str, Path], said: list[str]) -> None:
    model, given = opened(folders[kind], kind).train(), {**inputs(kind), "labels": LABELS[kind]}
    blocks = [module for module in model.modules() if type(module).__name__ == "Mlp"]
    calls: list[str] = []
    for block in blocks:
        block.register_forward_hook(lambda *_: calls.append("mlp"))
    # called gradient_checkpointing_enable before transformers 5.24
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    gradients: list[dict[str, Tensor | None]] = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options is not None:
            enable(options)
        model.zero_grad()
        model(**given).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert len(calls) == len(blocks) * (1 if options is None else 2)
        calls.clear()
    for name, gradient in gradients[0].items():
        if gradient is None:
            assert name.endswith(".positions")
            continue
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-5)
    assert said == []


@pytest.mark.parametrize("kind", KINDS)
def test_halves_and_forms(kind: str, folders: dict[str, Path]) -> None:
    """16-bit weights take inputs in fp32, and the output comes as a tuple on request."""
    model, given = opened(folders[kind], kind).eval(), inputs(kind)
    with torch.no_grad():
        whole = model(**given, output_hidden_states=True)
        for half in (opened(folders[kind], kind, dtype=torch.bfloat16).eval(), copy.deepcopy(model).half()):
            torch.testing.assert_close(half(**given)[0].float(), whole[0], atol=0.15, rtol=0.1)
        states = whole.hidden_states
        parts = model(**given, output_hidden_states=True, return_dict=False)
    assert len(states) == 1 + model.config.prenet_depth + model.config.num_hidden_layers
    assert len(parts) == 2 and torch.equal(parts[0], whole[0]) and torch.equal(parts[1][-1], states[-1])
    assert model(**given).hidden_states is None
    if kind in LABELS:
        made = model(**given, labels=LABELS[kind], return_dict=False)
        assert len(made) == 2 and made[0].shape == () and made[0].isfinite()
        assert torch.equal(made[0], model(**given, labels=LABELS[kind]).loss)
        assert type(model).accepts_loss_kwargs is False  # or Trainer adds up losses of accumulated steps


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("pictures", {"num_labels": 4}), ("sounds", {"num_labels": 4}),
        ("ctc", {"vocab_size": 9, "pad_token_id": 0}), ("sentence", {"num_labels": 4}),
    ],
)  # fmt: skip
def test_pretrained_encoders_take_new_heads(
    kind: str, options: dict[str, int], folders: dict[str, Path]
) -> None:
    modality = KINDS[kind][0]
    auto = getattr(transformers, KINDS[kind][2])
    model = auto.from_pretrained(folders[modality], trust_remote_code=True, **options)
    encoder = opened(folders[modality], modality)
    state = model.data2vec2.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in encoder.state_dict().items())
    outputs = model(**inputs(kind)).logits
    assert outputs.shape[-1] == next(iter(options.values()))
    if kind in ("pictures", "sounds"):
        assert torch.equal(model.fc_norm.weight, torch.ones(16)) and not model.head.bias.any()
    heads = [p for name, p in model.named_parameters() if not name.startswith("data2vec2.")]
    assert all(p.isfinite().all() and p.abs().max() < 2 for p in heads)


def test_new_models_have_their_constants(folders: dict[str, Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(folders["image"], trust_remote_code=True)
    model = transformers.AutoModel.from_config(config, trust_remote_code=True)
    table = model.modality_encoders["IMAGE"].fixed_positional_encoder.positions
    torch.testing.assert_close(table[0], sincos_positions(16, (6, 6)))
    config = transformers.AutoConfig.from_pretrained(folders["audio"], trust_remote_code=True)
    model = transformers.AutoModel.from_config(config, trust_remote_code=True)
    assert config.inputs_to_logits_ratio == 320
    if config.alibi:
        assert (model.modality_encoders["AUDIO"].alibi_scale == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_cards_tell_what_to_run(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    card = (folders[kind] / "README.md").read_text(encoding="utf-8")
    modality, head, auto = KINDS[kind]
    _, header, text = card.split("---\n", 2)
    assert re.findall(r"^(\w+): \S+$", header, flags=re.MULTILINE) == ["library_name", "pipeline_tag"]
    assert f"- {modality}\n" in header and "- data2vec2\n" in header
    assert str(folders[kind].parent) not in card and "/" not in re.sub("256/224|</s>", "", text)
    picture = tmp_path / "a.png"
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(picture)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {
        "FOLDER": folders[kind],
        "file": picture,
        "wave": np.ones(9_000),
        "text": "a cat",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the example leaves the file to Python
        exec(code, names)
    assert type(names["model"]) is type(opened(folders[kind], kind))
    shape = names["result"].shape
    assert shape[0] == 1 and shape[-1] == (16 if head is None else head.outputs)
    assert ("texts" in names) == (kind == "ctc")
    numel = sum(p.numel() for p in names["model"].parameters())
    assert f"{numel:,} parameters" in text


PIPELINES = {
    "pictures": ("image-classification", lambda: Image.fromarray(np.zeros((30, 40), np.uint8))),
    "sounds": ("audio-classification", lambda: np.random.default_rng(0).standard_normal(9_000)),
    "ctc": ("automatic-speech-recognition", lambda: np.random.default_rng(0).standard_normal(9_000)),
    "sentence": ("text-classification", lambda: "the </s> cat"),
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_pipelines(kind: str, folders: dict[str, Path], said: list[str]) -> None:
    task, sample = PIPELINES[kind]
    pipe = transformers.pipeline(task, str(folders[kind]), trust_remote_code=True, device="cpu")
    made = pipe(sample())
    reader = getattr(transformers, READERS[KINDS[kind][0]][-1])
    prepare = reader.from_pretrained(folders[kind], trust_remote_code=True)
    rate = {"sampling_rate": 16_000} if KINDS[kind][0] == "audio" else {}
    given = prepare(sample(), return_tensors="pt", **rate)
    with torch.no_grad():
        logits = opened(folders[kind], kind).eval()(**given).logits
    if kind == "ctc":
        assert made["text"] == prepare.batch_decode(logits.argmax(-1))[0]
    else:
        best = max(made, key=lambda entry: entry["score"])
        assert best["label"] == ["cat", "dog", "hen"][int(logits.argmax())]
        assert best["score"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-5)
