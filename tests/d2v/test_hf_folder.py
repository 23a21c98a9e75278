"""What a folder for transformers brings beside its model does as d2v does: pictures, waves, text."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tokenizers import AddedToken, Tokenizer

from d2v.config.fronts import ImageFront, TextFront
from d2v.config.run import Config, WaveNorm
from d2v.config.tune import DropConfig, HeadConfig, tuned_model_config
from d2v.data.images.source import ImageSource
from d2v.data.images.store import EXTENSIONS, ArrayStore, FolderStore
from d2v.data.normalisation import Normalisation
from d2v.data.open import open_data
from d2v.data.speech.letters import SPECIALS
from d2v.data.speech.transcripts import Vocabulary
from d2v.data.text.labelled import Sentence
from d2v.data.text.sentences import Specials, encode
from d2v.data.text.tokenizer import check_tokenizer, load_tokenizer, train_tokenizer
from d2v.data.types import DataError
from d2v.data.walk import walk
from d2v.evaluate.ctc import greedy
from d2v.formats.convert import run_convert, save_original
from d2v.formats.hf_export import write_folder
from d2v.model.tuned import BLANK, FineTuned
from tests.d2v.test_convert import moved
from tests.d2v.tiny_models import make_model
from tests.d2v.tiny_runs import LINES, tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp())
transformers = pytest.importorskip("transformers")

STATISTICS = {1: ((0.3,), (0.2,)), 3: ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), 4: ((0.5,) * 4, (0.2,) * 4)}


def picture_config(height: int, width: int, channels: int) -> Config:
    front = ImageFront(height=height, width=width, patch=4, channels=channels)
    mean, std = STATISTICS[channels]
    return tiny("image", model={"front": front}, data={"mean": mean, "std": std})


def picture_folder(cfg: Config, folder: Path) -> Path:
    folder.mkdir()
    assert isinstance(cfg.model.front, ImageFront)
    value = Normalisation(*STATISTICS[cfg.model.front.channels], "given")
    write_folder(make_model("image", front=cfg.model.front), folder, normalisation=value)
    return folder


def read_by_us(source: ImageSource, index: int) -> torch.Tensor:
    """[1,C,H,W] as evaluation, probes and extraction see it."""
    return source.finish(source.collate([source.read(index, None)], np.array([index]), None)).source


def drawn(mode: str, width: int, height: int) -> Image.Image:
    """A picture of noise over a ramp in any mode; palettes have transparent colours."""
    rng = np.random.default_rng(width * 1_000 + height)
    ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * 3 + np.arange(4) * 40
    pixels = ((ramp + rng.integers(0, 90, (height, width, 4))) % 256).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)
    if mode in ("CMYK", "RGBA"):
        return Image.fromarray(pixels, mode)
    if mode in ("LA",):
        return Image.fromarray(np.ascontiguousarray(pixels[..., :2]), mode)
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., :3])).convert(mode)
    if mode == "P":
        picture.info["transparency"] = 3
    return picture


ORIENTED = Image.Exif()
ORIENTED[274] = 6
SIZES = [(1, 1), (3, 90), (31, 32), (32, 32), (36, 37), (180, 331)]
FILES = {
    3: [(mode, "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    + [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("CMYK", "tif"), ("P", "gif"), ("RGB", "bmp")],
    1: [
        ("1", "png"),
        ("L", "png"),
        ("LA", "png"),
        ("I;16", "png"),
        ("L", "jpg"),
        ("RGB", "jpg"),
        ("P", "png"),
    ],
    4: [("RGBA", "png"), ("P", "png"), ("L", "png")],
}
PIPELINES = ("1", "L", "RGB", "CMYK")
"""modes of which transformers' own pipelines hand over the same: they drop transparency, and lower bits"""


@pytest.mark.parametrize("shape", [(32, 32, 3), (24, 40, 3), (40, 24, 1), (32, 32, 4)])
def test_pictures_are_read_as_in_evaluation(shape: tuple[int, int, int], tmp_path: Path) -> None:
    cfg = picture_config(*shape)
    (tmp_path / "pictures").mkdir()
    for mode, suffix in FILES[shape[2]]:
        for width, height in SIZES:
            name = f"{mode.replace(';', '')}-{width}x{height}.{suffix}"
            options = {"exif": ORIENTED} if suffix == "jpg" else {}
            drawn(mode, width, height).save(tmp_path / "pictures" / name, **options)
    store = FolderStore(tmp_path / "pictures", walk(tmp_path / "pictures", EXTENSIONS).files)
    source = ImageSource("pictures", store, cfg).prepare(cfg.data)
    processor = transformers.AutoImageProcessor.from_pretrained(
        picture_folder(cfg, tmp_path / "hf"), trust_remote_code=True
    )
    for index in range(len(store)):
        wanted = read_by_us(source, index)
        made = processor(store.load(index), return_tensors="pt")["pixel_values"]
        assert torch.equal(made, wanted), store.name(index)
        if Path(store.name(index)).name.startswith(tuple(f"{mode}-" for mode in PIPELINES)):
            handed = ImageOps.exif_transpose(store.load(index)).convert("RGB")
            made = processor(handed, return_tensors="pt")["pixel_values"] if shape[2] < 4 else wanted
            assert torch.equal(made, wanted), store.name(index)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (24, 40, 1)])
def test_arrays_are_read_as_in_evaluation(shape: tuple[int, int, int], kind: str, tmp_path: Path) -> None:
    cfg = picture_config(*shape)
    processor = transformers.AutoImageProcessor.from_pretrained(
        picture_folder(cfg, tmp_path / "hf"), trust_remote_code=True
    )
    for width, height in SIZES:
        pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, shape[2]), dtype=np.uint8)
        images = pixels if kind == "uint8" else pixels.astype(np.float32) / 100 - 1
        source = ImageSource("arrays", ArrayStore("arrays", images), cfg).prepare(cfg.data)
        wanted = torch.cat([read_by_us(source, 0), read_by_us(source, 1)])
        first = torch.from_numpy(images).permute(0, 3, 1, 2)
        given = [images, list(images), first, list(first)] if width != shape[2] else [images]
        for form in given:
            made = processor(form, return_tensors="pt")["pixel_values"]
            assert torch.equal(made, wanted), (width, height)
        if shape[2] == 1:
            made = processor(list(images[..., 0]), return_tensors="pt")["pixel_values"]
            assert torch.equal(made, wanted)


def test_pictures_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    grey = transformers.AutoImageProcessor.from_pretrained(
        picture_folder(picture_config(32, 32, 1), tmp_path / "grey"), trust_remote_code=True
    )
    ours, colour = drawn("L", 40, 50), drawn("RGB", 40, 50)
    first = np.asarray(colour).transpose(2, 0, 1)
    given = [ours, ours.convert("RGB"), colour, colour.convert("L"), np.asarray(colour), torch.tensor(first)]
    made = grey(given, return_tensors="pt")["pixel_values"]
    assert torch.equal(made[0], made[1]) and torch.equal(made[2], made[3])
    assert torch.equal(made[4], made[5]) and abs(made[4] - made[2]).max() < 0.1  # of 5, for noise
    wrong: list[tuple[object, str]] = [
        (np.zeros((40, 40, 4), np.uint8), "the picture has 4 channels, the model reads 1"),
        (np.full((40, 40), np.nan, np.float32), "NaN or inf among the pixels"),
        (np.zeros((40, 40), np.int64), "must be uint8 or float, got int64"),
        (np.zeros(40, np.uint8), r"got shape \(40,\)"),
        (Image.new("F", (40, 40)), "32-bit pixels"),
    ]
    for picture, message in wrong:
        with pytest.raises(ValueError, match=message):
            grey([picture])


def spoken_folder(letters: str | None, folder: Path, waves: Any = "fairseq") -> tuple[Path, Vocabulary]:
    """A folder of CTC, or of an encoder alone."""
    folder.mkdir()
    vocabulary = Vocabulary((*SPECIALS, *(letters or "")))
    if letters is None:
        write_folder(make_model("audio"), folder, waves=waves)
    else:
        head = HeadConfig(task="ctc", outputs=len(vocabulary.letters))
        model = FineTuned(tiny("audio").model, head)
        write_folder(model, folder, labels=list(vocabulary.letters), waves=waves)
    return folder, vocabulary


@pytest.mark.parametrize("norm", get_args(WaveNorm))
def test_waves_are_read_as_in_evaluation(norm: Any, tmp_path: Path) -> None:
    """Quiet ones too, whose variance is not far above what is added to it."""
    (tmp_path / "data").mkdir()
    waves = []
    for number, loudness in enumerate((0.3, 0.01, 0.003, 0.0)):
        wave = loudness * np.random.default_rng(number).standard_normal(9_000 + 2_000 * number) + 0.01
        soundfile.write(tmp_path / "data" / f"{number}.wav", wave.astype(np.float32), 16_000, subtype="FLOAT")
        waves.append(wave.astype(np.float32))
    cfg = tiny("audio", data={"wave_norm": norm})
    ((_, batch),) = open_data(str(tmp_path / "data"), cfg, purpose="eval").in_order(4)
    assert batch.padding_mask is not None
    for letters in (None, "|AB"):
        folder, _ = spoken_folder(letters, tmp_path / f"hf-{letters}", norm)
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
        made = extractor(waves, sampling_rate=16_000, padding=True, return_tensors="pt")
        if norm == "transformers":  # whose own code computes it, in another order of sums
            torch.testing.assert_close(made["input_values"], batch.source, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(made["input_values"], batch.source)
        assert torch.equal(made["attention_mask"] == 0, batch.padding_mask)
        alone = extractor(waves[2], sampling_rate=16_000)["input_values"][0]
        assert np.array_equal(alone, made["input_values"][2, : len(waves[2])].numpy())


TEXTS = ["hello", "Hello, World!", "HELLO", "a </s> <s> <unk> b|", "it\u2019s  me", "", "w\u00f6rld 1"]


@pytest.mark.parametrize("letters", ["|helowrdab'", "|HELOWRDAB'", "|HhelowrdABab"])
def test_letters_are_ours(letters: str, tmp_path: Path) -> None:
    folder, vocabulary = spoken_folder(letters, tmp_path / "hf")
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(processor, transformers.Wav2Vec2Processor)
    assert isinstance(processor.feature_extractor, transformers.Wav2Vec2FeatureExtractor)
    processor.save_pretrained(tmp_path / "again")
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    for tokenizer in (processor.tokenizer, again.tokenizer):
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            assert ids == vocabulary.encode(text).tolist()
            assert tokenizer.decode(ids, group_tokens=False) == vocabulary.decode(ids)
        logits = torch.randn(20, 30, len(vocabulary.letters))
        wanted = [vocabulary.decode(ids) for ids in greedy(logits, None)]
        assert tokenizer.batch_decode(logits.argmax(-1)) == wanted
        assert tokenizer.batch_decode(logits.argmax(-1), skip_special_tokens=True) == wanted
    both = processor(audio=np.ones(400), sampling_rate=16_000, text="hello", return_tensors="pt")
    assert both["labels"].tolist() == [vocabulary.encode("hello").tolist()]


def test_without_the_code_transformers_own_classes_decode(tmp_path: Path) -> None:
    folder, vocabulary = spoken_folder("|ab", tmp_path / "hf")
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(folder)
    assert tokenizer("a ab")["input_ids"] == vocabulary.encode("a ab").tolist()[:-1]
    assert tokenizer.decode([5, 5, 0, 5, 4, 6, 0, 0]) == "aa b"
    stock = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    assert type(stock) is transformers.Wav2Vec2Processor


def test_beam_decoders_take_the_blank_for_one(tmp_path: Path) -> None:
    """pyctcdecode looks for a label like <pad> or [PAD], at any number, and takes | for a space."""
    folder, vocabulary = spoken_folder("|ab", tmp_path / "hf")
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    numbers = processor.tokenizer.get_vocab()
    assert sorted(numbers.values()) == list(range(len(vocabulary.letters)))
    labels = sorted(numbers, key=numbers.__getitem__)
    assert [number for number, label in enumerate(labels) if re.match(r"^[<\[]pad[>\]]$", label)] == [BLANK]
    assert labels[2:] == list(vocabulary.letters[2:]) and "" not in labels and " " not in labels
    assert processor.tokenizer.pad_token_id == BLANK == 0


def test_beam_decoders_give_our_text(tmp_path: Path) -> None:
    pyctcdecode = pytest.importorskip("pyctcdecode")
    folder, vocabulary = spoken_folder("|ab", tmp_path / "hf")
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    labels = ["<pad>", "<s>", *vocabulary.letters[2:]]
    decoder = pyctcdecode.build_ctcdecoder(labels)
    with_lm = transformers.Wav2Vec2ProcessorWithLM(processor.feature_extractor, processor.tokenizer, decoder)
    path = torch.tensor([5, 0, 5, 5, 4, 0, 6, 6, 0])
    logits = 10.0 * F.one_hot(path, len(labels))
    assert with_lm.decode(logits.numpy()).text == processor.tokenizer.decode(path) == "aa b"


def test_letters_beside_a_file_of_the_original_go_along(tmp_path: Path) -> None:
    model = FineTuned(tuned_model_config(moved("audio").cfg, DropConfig()), HeadConfig(task="ctc", outputs=7))
    save_original(model, tmp_path / "a.pt")
    (tmp_path / "dict.ltr.txt").write_text("| 9\nE 5\nT 3\n")
    run_convert(tmp_path / "a.pt", tmp_path / "hf", "hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert processor.tokenizer("tee te")["input_ids"] == [6, 5, 5, 4, 6, 5, 4]
    run_convert(tmp_path / "hf", tmp_path / "b", "safetensors")
    assert Vocabulary.read(tmp_path / "b" / "vocabulary.json").letters == (*SPECIALS, "|", "E", "T")
    (tmp_path / "dict.ltr.txt").write_text("| 9\n| 5\n")
    with pytest.raises(DataError, match=r"dict.ltr.txt: a vocabulary begins with .* and repeats nothing"):
        run_convert(tmp_path / "a.pt", tmp_path / "c", "hf")


def test_vocabularies_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    model = FineTuned(tiny("audio").model, HeadConfig(task="ctc", outputs=4))
    with pytest.raises(ValueError, match="a CTC vocabulary begins with <s>, <pad>, </s>, <unk>, got"):
        write_folder(model, tmp_path, labels=["<pad>", "<s>", "</s>", "<unk>"])


def with_mask(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])


def cut_and_padded(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9)


def ordinary(tokenizer: Tokenizer) -> None:
    """The file says that <s> and its like are no special tokens, and so are matched in texts."""
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = False
    tokenizer.__setstate__(json.dumps(state).encode())


SENTENCES = [
    "the cat </s> sat",
    "<s>the<pad> <unk>, <mask> mat",
    " </s>",
    "",
    "  the  cat </s></s>",
    "caf\u00e9 \u2603 it's .",
]


@pytest.mark.parametrize("changed", [lambda _: None, with_mask, cut_and_padded, ordinary])
def test_tokens_are_ours(changed: Callable[[Tokenizer], None], tmp_path: Path) -> None:
    """Special tokens in a sentence stay text; pairs are joined and cut alike."""
    file, folder = tmp_path / "tokenizer.json", tmp_path / "hf"
    made = train_tokenizer(iter(LINES), 300)
    changed(made)
    made.save(str(file))
    folder.mkdir()
    write_folder(make_model("text"), folder, tokenizer=file)
    front = tiny("text").model.front
    assert isinstance(front, TextFront)
    loaded = check_tokenizer(load_tokenizer(file), "it", front)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    # an empty second text is none to transformers
    texts = [(a, b) for a, b in zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True) if b]
    for tokenizer in (theirs, again):
        for block in (8, 11, 400):
            singles = encode([Sentence((a,), "") for a in SENTENCES], loaded, block, Specials())
            pairs = encode([Sentence(pair, "") for pair in texts], loaded, block, Specials())
            given = {"truncation": block < 400, "max_length": block}
            assert tokenizer(SENTENCES, **given)["input_ids"] == [ids.tolist() for ids in singles]
            assert [tokenizer(*p, **given)["input_ids"] for p in texts] == [ids.tolist() for ids in pairs]
        for sentence, ids in zip(SENTENCES, singles, strict=True):
            assert tokenizer.decode(ids, skip_special_tokens=True) == sentence
