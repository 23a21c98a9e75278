"""Labelled data for fine-tuning: sentences, transcripts, letters, masks, limits, mixing, decoding, scores."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, processors

from d2v.config.presets import preset
from d2v.config.recipes import RECIPES, recipe
from d2v.config.toml import from_dict, to_dict
from d2v.config.tune import AugmentConfig, FineTuneConfig
from d2v.data.images.augment import erase, mix, rand_augment
from d2v.data.loader import generator
from d2v.data.speech.letters import normalise
from d2v.data.speech.transcripts import Vocabulary, read_spoken
from d2v.data.splits import divide
from d2v.data.text.labelled import GLUE, Sentence, read_labelled
from d2v.data.text.sentences import Specials, encode, pad, targets_of
from d2v.data.text.tokenizer import train_tokenizer
from d2v.data.tune import choose, span_mask
from d2v.data.types import DataError
from d2v.evaluate.ctc import beam_search, greedy
from d2v.evaluate.scores import GLUE_METRICS, class_scores, regression_scores, transcript_scores
from d2v.train.finetune import is_better
from d2v.train.losses import ctc_loss, soft_cross_entropy
from tests.d2v.tiny_runs import LINES, tiny

ROWS = {
    "cola": (["gj04\t1\t\tShe ran.", "gj04\t0\t*\tRan she."], ("She ran.",), "1"),
    "sst2": (["sentence\tlabel", "good \t1", "bad\t0"], ("good ",), "1"),
    "mrpc": (["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tA "b\tC d', "0\t7\t8\te\tf"],
             ('A "b', "C d"), "1"),
    "stsb": (["index\tsentence1\tsentence2\tscore", "0\ta\tb\t2.5", "1\tc\td\t5"], ("a", "b"), "0.5"),
    "qqp": (["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\ta?\tb?\t0", "1\t2\t3\tc\td\t1"],
            ("a?", "b?"), "0"),
    "mnli": (["index\tsentence1\tsentence2\tgold_label", "0\ta\tb\tneutral", "1\tc\td\t-",
              "2\tc\td\tentailment"], ("a", "b"), "neutral"),
    "qnli": (["index\tquestion\tsentence\tlabel", "0\tq\ts\tentailment", "1\tq\ts\tnot_entailment"],
             ("q", "s"), "entailment"),
    "rte": (["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment", "1\ta\tb\tnot_entailment"],
            ("a", "b"), "entailment"),
}  # fmt: skip


@pytest.mark.parametrize("task", GLUE)
def test_glue_files_are_read(task: str, tmp_path: Path) -> None:
    lines, first, label = ROWS[task]
    for part in ("train", *GLUE[task].evaluated):
        (tmp_path / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    found, _ = read_labelled(str(tmp_path), task)
    assert found.keys() == {"train", *GLUE[task].evaluated}
    assert found["train"][0] == Sentence(first, label) and len(found["train"]) == 2
    made = recipe(f"glue_{task}")
    assert made.glue == task and made.head.regression == (task == "stsb") and task in GLUE_METRICS
    targets = targets_of(found["train"], made.head.regression)
    assert targets.encode(found["train"], "here").dtype == (np.float32 if task == "stsb" else np.int64)


def test_broken_sentence_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train.tsv does not exist"):
        read_labelled(str(tmp_path), "rte")
    (tmp_path / "train.tsv").write_text("index\tsentence1\tlabel\n")
    (tmp_path / "dev.tsv").write_text("")
    with pytest.raises(DataError, match="has no column 'sentence2', its columns: index, sentence1, label"):
        read_labelled(str(tmp_path), "rte")
    with pytest.raises(DataError, match="has no column 'text', its columns: index, sentence1, label"):
        read_labelled(str(tmp_path), None)
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": true}\n')
    with pytest.raises(DataError, match=r'a.jsonl:1 has no "label" that is a string or a number'):
        read_labelled(str(tmp_path / "a.jsonl"), None)
    with pytest.raises(DataError, match="regression needs numbers"):
        targets_of([], True).encode([Sentence(("x",), "good")], "here")
    with pytest.raises(DataError, match="class 'c' is not among the training classes"):
        targets_of([Sentence(("x",), "a")], False).encode([Sentence(("x",), "c")], "here")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(LINES), 300)


def test_pairs_are_joined_as_roberta_does_and_cut_at_the_longer_text(tokenizer: Tokenizer) -> None:
    a, b = "the cat sat on the mat", "rain"
    ids = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in (a, b)}
    pair, roberta = Sentence((a, b), "0"), Specials()
    whole, single = encode([pair, Sentence((a,), "0")], tokenizer, 100, roberta)
    (cut,) = encode([pair], tokenizer, 4 + len(ids[b]) + 2, roberta)
    keep = min(len(ids[b]), (len(ids[b]) + 2) // 2)
    assert whole.tolist() == [0, *ids[a], 2, 2, *ids[b], 2]
    assert single.tolist() == [0, *ids[a], 2]
    assert cut.tolist() == [0, *ids[a][: len(ids[b]) + 2 - keep], 2, 2, *ids[b][:keep], 2]


def test_pairs_are_joined_as_the_tokenizer_says(tokenizer: Tokenizer) -> None:
    assert Specials.of(tokenizer, 1) is None
    bert = Tokenizer.from_str(tokenizer.to_str())
    bert.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    specials = Specials.of(bert, 3)
    assert specials == Specials(0, (2,), 2, 3)
    texts = ("the cat", "rain, and more rain")
    rows = encode([Sentence(texts, "0"), Sentence(texts[:1], "0")], bert, 100, specials)
    assert [row.tolist() for row in rows] == [bert.encode(*texts).ids, bert.encode(texts[0]).ids]
    for block in (5, 6, 7, 12):  # the library's own way to cut
        bert.enable_truncation(block, strategy="longest_first")
        (cut,) = encode([Sentence(texts, "0")], tokenizer, block, specials)
        assert cut.tolist() == bert.encode(*texts).ids and len(cut) == block
    source, padding = pad(rows, 3)
    assert torch.equal(padding, source == 3) and padding.any()


def test_limits_are_balanced_and_seeded() -> None:
    labels = np.array([0] * 50 + [1] * 30 + [2] * 3)
    keep = choose(labels, 12, 1)
    assert Counter(labels[keep].tolist()) == {0: 5, 1: 4, 2: 3} or Counter(labels[keep].tolist()) == {
        0: 4,
        1: 5,
        2: 3,
    }
    assert np.array_equal(keep, choose(labels, 12, 1)) and not np.array_equal(keep, choose(labels, 12, 2))
    assert np.array_equal(choose(labels, None, 1), np.arange(83))
    with pytest.raises(ValueError, match="at least one of each of 3 classes, got 2"):
        choose(labels, 2, 1)


def make_speech(folder: Path, said: dict[str, str], style: str) -> None:
    """Noise with transcripts, in Librispeech's layout or as text files."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, text in said.items():
        soundfile.write(folder / f"{name}.flac", 0.1 * rng.standard_normal(16_000), 16_000)
        if style == "txt" and text:
            (folder / f"{name}.txt").write_text(text + "\n")
    if style == "librispeech":
        lines = [f"{name} {text}" for name, text in said.items() if text]
        (folder / "1-2.trans.txt").write_text("\n".join(lines) + "\n")


def test_transcripts_are_found_in_every_layout(tmp_path: Path) -> None:
    cfg = tiny("audio")
    said = {"1-2-0": "HELLO WORLD", "1-2-1": "IT'S ME", "1-2-2": ""}
    make_speech(tmp_path / "libri" / "train-clean-100" / "1" / "2", said, "librispeech")
    make_speech(tmp_path / "libri" / "dev-other" / "3" / "4", said, "librispeech")
    make_speech(tmp_path / "plain" / "all", {f"{i}": f"word {i}" for i in range(10)}, "txt")
    found = read_spoken(str(tmp_path / "libri"), cfg, 16_000)
    assert found.keys() == {"train", "dev-other"} and found["train"].texts == ["HELLO WORLD", "IT'S ME"]
    assert found["train"].report.skipped == {"no transcript": ["train-clean-100/1/2/1-2-2.flac"]}
    assert len(found["train"].utterances.wave(0)) == 16_000
    plain = read_spoken(str(tmp_path / "plain"), cfg, 16_000)
    held = [f"word {i}" for i in divide([""] * 10)["test"]]
    assert plain["test"].texts == held and len(held) == 2 and len(plain["train"].texts) == 8
    root = tmp_path / "libri" / "dev-other" / "3" / "4"
    for part in ("train", "valid"):
        (tmp_path / f"{part}.tsv").write_text(f"{root}\n1-2-0.flac\t16000\n1-2-1.flac\t16000\n")
        (tmp_path / f"{part}.ltr").write_text("H E L L O | W O R L D |\nI T ' S | M E |\n")
    manifest = read_spoken(str(tmp_path), cfg, 16_000)
    assert manifest.keys() == {"train", "valid"} and manifest["valid"].texts == ["HELLO WORLD", "IT'S ME"]
    (tmp_path / "valid.ltr").write_text("H |\n")
    with pytest.raises(DataError, match=r"valid.ltr has 1 lines, .*valid.tsv names 2 files"):
        read_spoken(str(tmp_path), cfg, 16_000)
    make_speech(tmp_path / "silent", {"a": ""}, "txt")
    with pytest.raises(DataError, match="no audio file has a transcript"):
        read_spoken(str(tmp_path / "silent"), cfg, 16_000)


def test_embedded_speech_has_its_sentences() -> None:
    cfg = preset("audio_tiny")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, max_seconds=15.0))
    found = read_spoken("speech", cfg, 16_000)
    assert found.keys() == {"train", "test", "unseen_voice"}
    assert all(normalise(text) for text in found["unseen_voice"].texts)


def test_long_utterances_are_left_out_of_training_only(tmp_path: Path) -> None:
    cfg = tiny("audio", data={"max_seconds": 0.9})
    make_speech(tmp_path / "train", {"a": "x"}, "txt")
    make_speech(tmp_path / "test", {"a": "x"}, "txt")
    with pytest.raises(
        DataError, match=r"no utterance of part train can be used.*longer than data.max_seconds"
    ):
        read_spoken(str(tmp_path), cfg, 16_000)


def test_vocabulary(tmp_path: Path) -> None:
    vocabulary = Vocabulary.of(["hello, World!", "o"])
    assert vocabulary.letters[:6] == ("<s>", "<pad>", "</s>", "<unk>", "L", "O")
    ids = vocabulary.encode("hello  World?")
    assert vocabulary.decode(ids.tolist()) == "HELLO WORLD"
    assert vocabulary.encode("z").tolist()[0] == vocabulary.letters.index("<unk>")
    vocabulary.write(tmp_path / "v.json")
    assert Vocabulary.read(tmp_path / "v.json") == vocabulary
    (tmp_path / "dict.ltr.txt").write_text("| 10\nE 7\n' 2\n")
    assert Vocabulary.read(tmp_path / "dict.ltr.txt").letters == (
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "|",
        "E",
        "'",
    )
    (tmp_path / "bad.json").write_text('["a", "b"]')
    with pytest.raises(DataError, match="a vocabulary begins with <s>"):
        Vocabulary.read(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("letters", "text", "spelled"),
    [
        ("|helo", "Hello, HELLO", "hello hello"),
        ("|HELO", "Hello, hello", "HELLO HELLO"),
        ("|HhELelo", "Hello HELLO", "Hello HELLo"),
        ("|ßSTRAßE", "straße STRASSE", "STRAßE STRASSE"),
        ("|STRAE", "straße", "STRASSE"),
        ("|εγώ'", "ΕΓΏ", "εγώ"),
    ],
)
def test_texts_take_the_case_of_the_vocabulary(letters: str, text: str, spelled: str) -> None:
    vocabulary = Vocabulary((*["<s>", "<pad>", "</s>", "<unk>"], *dict.fromkeys(letters)))
    ids = vocabulary.encode(text).tolist()
    assert vocabulary.spell(text) == vocabulary.decode(ids) == spelled
    assert vocabulary.letters.index("<unk>") not in ids
    assert vocabulary.encode("zx y").tolist() == [3, 3, 4, 3, 4]
    assert vocabulary.spell("z\u2019s </s>") == vocabulary.spell("Z'S  S")


@pytest.mark.parametrize(("prob", "length"), [(0.65, 10), (0.2, 5), (0.1, 64)])
def test_span_masks_are_fairseqs(prob: float, length: int) -> None:
    """compute_mask_indices: spans of a length, their starts distinct, equally many places in every row."""
    lengths = np.array([499, 400, 499, 300])
    rngs = [generator(1, 4, 0, i) for i in range(4)]
    mask = span_mask(lengths, 499, prob, length, rngs)
    counts = mask.sum(1)
    assert (counts == counts[0]).all() and counts[0] > 0
    assert not any(mask[i, n - 1 :].any() for i, n in enumerate(lengths))  # nor the last frame itself
    again = span_mask(lengths, 499, prob, length, [generator(1, 4, 0, i) for i in range(4)])
    other = span_mask(lengths, 499, prob, length, [generator(1, 4, 1, i) for i in range(4)])
    assert np.array_equal(mask, again) and not np.array_equal(mask, other)
    # one row alone keeps all of its spans: as many as asked for, some overlapping
    alone = span_mask(lengths[:1], 499, prob, length, [generator(7, 4, 0, 0)])[0]
    spans = prob * 499 / length
    assert length <= alone.sum() <= (spans + 1) * length
    runs = [len(list(group)) for masked, group in itertools.groupby(alone) if masked]
    assert min(runs) >= length


def test_short_rows_get_what_fits() -> None:
    mask = span_mask(np.array([3, 12]), 12, 0.65, 10, [np.random.default_rng(i) for i in range(2)])
    assert mask.shape == (2, 12) and mask[0].sum() == mask[1].sum() > 0 and not mask[0, 3:].any()
    none = span_mask(np.array([8]), 8, 0.01, 4, [np.random.default_rng(0)], least=0)
    assert not none.any()


class Drawn:
    """In place of a generator: what it draws, in order."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)

    def beta(self, a: float, b: float) -> float:
        assert a == b
        return self.values.pop(0)

    def integers(self, high: int) -> int:
        return int(self.values.pop(0))


BOTH = AugmentConfig(mixup=0.8, cutmix=1.0, mix_probability=0.9, mix_switch=0.5, label_smoothing=0.1)


def mixed_by(
    source: torch.Tensor, augment: AugmentConfig, *values: float
) -> tuple[torch.Tensor, torch.Tensor]:
    draws: Any = Drawn(*values)
    found = mix(source, torch.arange(len(source)), 5, augment, draws)
    assert not draws.values
    return found


def test_mixing_is_timms_of_a_batch() -> None:
    """timm/data/mixup.py, Mixup(mode="batch"): one draw, the batch reversed, the true area of the box."""
    source = torch.rand(4, 3, 20, 30)
    reverse, off = source.flip(0), 0.1 / 5
    one_hot = torch.eye(5)[:4]
    plain = off + 0.9 * one_hot

    pictures, shares = mixed_by(source, BOTH, 0.95)  # above mix_probability
    assert pictures.data_ptr() == source.data_ptr()
    torch.testing.assert_close(shares, plain)

    pictures, shares = mixed_by(source, BOTH, 0.89, 0.6, 0.3)  # mixup, 30% stay
    torch.testing.assert_close(pictures, 0.3 * source + 0.7 * reverse)
    torch.testing.assert_close(shares, 0.3 * plain + 0.7 * plain.flip(0))

    # cutmix, 75% wished to stay: a box of 10 x 15, of which 14 columns are used, cut at two borders
    pictures, shares = mixed_by(source, BOTH, 0.1, 0.4, 0.75, 2, 28)
    expected = source.clone()
    expected[:, :, 0:7, 21:30] = reverse[:, :, 0:7, 21:30]
    assert torch.equal(pictures, expected)
    kept = 1 - 7 * 9 / 600
    torch.testing.assert_close(shares, kept * plain + (1 - kept) * plain.flip(0))

    # one kind alone asks for no switch
    assert torch.equal(mixed_by(source, AugmentConfig(mixup=1.0), 0.0, 1.0)[0], source)
    assert torch.equal(mixed_by(source, AugmentConfig(cutmix=1.0), 0.0, 0.0, 10, 15)[0], reverse)

    # groups of mix_batch pictures have draws of their own; the last one may be smaller
    grouped = dataclasses.replace(BOTH, mix_batch=3)
    pictures, shares = mixed_by(source, grouped, 0.0, 0.9, 0.25, 0.0, 0.9, 0.5)
    torch.testing.assert_close(pictures[:3], 0.25 * source[:3] + 0.75 * source[:3].flip(0))
    torch.testing.assert_close(pictures[3], source[3])
    torch.testing.assert_close(shares[0], 0.25 * plain[0] + 0.75 * plain[2])
    with pytest.raises(ValueError, match="augment.mix_batch must be positive or none, got 0"):
        AugmentConfig(mix_batch=0)


def test_mixing_keeps_labels_and_shares_together() -> None:
    source = torch.zeros(6, 1, 20, 20)
    source[:3] = 1.0
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    for augment in (
        AugmentConfig(mixup=0.8),
        AugmentConfig(cutmix=1.0),
        AugmentConfig(mixup=0.8, cutmix=1.0),
    ):
        for seed in range(8):
            mixed, soft = mix(source, labels, 3, augment, np.random.default_rng(seed))
            # class 0 is white and class 1 black: the share of white is the weight of class 0
            torch.testing.assert_close(mixed.mean((1, 2, 3)), soft[:, 0], rtol=0, atol=1e-5)
            torch.testing.assert_close(soft.sum(1), torch.ones(6))
            assert len(soft[:3, 0].unique()) == 1  # one share for the batch
    expected = torch.nn.functional.cross_entropy(
        torch.eye(3), torch.arange(3), reduction="sum", label_smoothing=0.3
    )
    got = soft_cross_entropy(torch.eye(3), torch.eye(3) * 0.7 + 0.1)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_and_erasing(channels: int) -> None:
    torch.manual_seed(0)
    pixels = torch.rand(20, channels, 24, 24)
    augmented = rand_augment(pixels, 2, 9)
    assert augmented.shape == pixels.shape and augmented.min() >= 0 and augmented.max() <= 1
    changed = (augmented != pixels).flatten(1).any(1)
    assert changed.float().mean() > 0.5
    erased = erase(pixels, 0.5)
    holes = (erased != pixels).any(1).flatten(1).float().mean(1)
    assert 0 < (holes > 0).sum() < 20 and (holes[holes > 0] <= 0.4).all()
    torch.manual_seed(0)
    assert torch.equal(rand_augment(torch.rand(20, channels, 24, 24), 2, 9), augmented)


def shares_of_texts(logits: torch.Tensor) -> Counter[tuple[int, ...]]:
    """The probability of every text that frames [1,T,V] can mean, over all of its paths."""
    probabilities = logits.softmax(-1)[0]
    texts: Counter[tuple[int, ...]] = Counter()
    for path in itertools.product(range(logits.shape[2]), repeat=logits.shape[1]):
        merged = [letter for letter, _ in itertools.groupby(path)]
        share = math.prod(float(probabilities[t, letter]) for t, letter in enumerate(path))
        texts[tuple(x for x in merged if x)] += share  # type: ignore[assignment]
    return texts


def test_beam_search_finds_the_most_probable_text() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        logits = 2 * torch.randn(1, 5, 3)
        texts = shares_of_texts(logits)
        (found,) = beam_search(logits, None, 200)
        assert texts[tuple(found)] == pytest.approx(max(texts.values()), rel=1e-6)
    # frames "a - a" and "a a -": the best path and the beam agree on repeats
    sure = 20 * torch.nn.functional.one_hot(torch.tensor([[1, 0, 1], [1, 1, 0]]), 3).float()
    assert greedy(sure, None) == beam_search(sure, None, 4) == [[1, 1], [1]]
    padded = torch.tensor([[False, False, True], [False] * 3])
    assert greedy(sure, padded) == beam_search(sure, padded, 4) == [[1], [1]]
    with pytest.raises(ValueError, match="width must be positive"):
        beam_search(sure, None, 0)


def test_ctc_loss_leaves_padding_and_impossible_texts_out() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 4, requires_grad=True)
    labels = [np.array([1, 2]), np.array([3, 3, 3, 3])]
    padded = torch.arange(6) >= torch.tensor([4, 6])[:, None]
    loss = ctc_loss(logits, np.array([4, 6]), labels)
    alone = ctc_loss(logits[:1, :4], np.array([4]), labels[:1])
    torch.testing.assert_close(loss, alone)  # four equal letters need seven frames
    loss.backward()
    assert logits.grad is not None and not logits.grad[padded].any() and not logits.grad[1].any()


def test_scores() -> None:
    logits = np.eye(7)[[0, 1, 2, 3]] + 0.1 * np.arange(7)
    labels = np.array([0, 1, 2, 6])
    assert class_scores(logits, labels) == {"top1": 0.75, "top5": 1.0}
    two = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = class_scores(two, np.array([1, 0, 0, 1]), ("matthews", "f1", "accuracy"))
    assert found == {"matthews": 0.0, "f1": 0.5, "accuracy": 0.5}
    line = regression_scores(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    assert line == pytest.approx({"pearson": 1.0, "spearman": 1.0, "mse": 14 / 3})
    assert regression_scores(np.ones(3), np.arange(3.0))["pearson"] == 0.0
    assert transcript_scores(["A B", "C"], ["A X", "C"]) == pytest.approx({"wer": 1 / 3, "cer": 1 / 4})
    assert (
        is_better("dev/wer", 0.1, 0.2) and is_better("test/top1", 0.3, 0.2) and is_better("x/wer", 9.0, None)
    )


def test_every_recipe_makes_a_config() -> None:
    fits = {"classify": ("image_tiny", "audio_tiny"), "ctc": ("audio_base",), "sentence": ("text_tiny",)}
    assert len(RECIPES) == 3 + 10 + 8 + 4
    for name in RECIPES:
        made = recipe(name)
        model = preset(fits[made.head.task][name == "sound_tiny"]).model
        cfg = made.on(name, model)
        assert cfg.recipe == name and cfg.model.layerdrop == made.drop.layer
    assert recipe("librispeech_960h_base").optim.lr == 1e-4
    values = to_dict(recipe("imagenet_base").on("imagenet_base", preset("image_base").model))
    assert values["augment"].pop("mix_batch") == 32
    assert from_dict(FineTuneConfig, values).augment.mix_batch is None  # a run from before there was one
    with pytest.raises(ValueError, match="no recipe 'imagenet'; nearest: imagenet_"):
        recipe("imagenet")
