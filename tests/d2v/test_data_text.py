"""Text from .txt and .jsonl files and the standard library, and the tokenizers under it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v.config.fronts import TextFront
from d2v.config.presets import preset
from d2v.config.run import Config, DataConfig
from d2v.data.embedded import text as stdlib
from d2v.data.open import check_data, open_data, open_labelled
from d2v.data.text import records
from d2v.data.text.tokenizer import BOS, EOS, PAD, SPECIALS, load_tokenizer, train_tokenizer
from d2v.data.types import Batch, DataError, Pipeline, Position

START = Position()
WORDS = "the quick brown fox jumps over a lazy dog and finds über-große Käse in naïve cafés"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(vocab_size: int = 300, **data) -> Config:
    cfg = preset("text_tiny")
    front = TextFront(vocab_size=vocab_size, max_positions=64, dropout=0.0)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, front=front),
        data=DataConfig(**{"batch": 4, "block": 16, **data}),
    )


def prose(words: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    lines = [" ".join(rng.choice(WORDS.split(), 8)) + ".\n" for _ in range(-(-words // 8))]
    return "".join(lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "deep").mkdir(parents=True)
    for i in range(3):
        (root / "deep" / f"{i}.txt").write_text(prose(80, i), encoding="utf-8")
    lines = [json.dumps({"text": prose(8, 10 + i), "label": i % 2}) for i in range(10)]
    (root / "lines.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return root


def first(pipeline: Pipeline, steps: int = 1, micro: int = 4, start: Position = START) -> list[Batch]:
    stream = pipeline.micro_batches(start, micro)
    return [b for step in itertools.islice(stream, steps) for b in step]


def test_blocks_are_the_documents_in_order(folder: Path, tmp_path: Path):
    """<s> then consecutive tokens; decoding them all gives back every document, </s> between."""
    pipeline = open_data(str(folder), config(), run_dir=tmp_path / "run")
    assert pipeline.meta == {"tokenizer": str(tmp_path / "run" / "tokenizer.json")}
    batches = [batch for _, batch in pipeline.in_order(7)]
    source = torch.cat([b.source for b in batches])
    assert source.dtype == torch.int64 and source.shape[1] == 16
    assert (source[:, 0] == BOS).all()
    assert all(b.padding_mask is None for b in batches)
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    documents = [f.read_text(encoding="utf-8") for f in sorted((folder / "deep").iterdir())]
    documents += [
        json.loads(line)["text"] for line in (folder / "lines.jsonl").read_text().splitlines() if line
    ]
    text = tokenizer.decode(source[:, 1:].flatten().tolist(), skip_special_tokens=False)
    assert "</s>".join(documents).startswith(text)
    assert len(text) > 0.95 * sum(map(len, documents))
    assert pipeline.report.total == 13 and pipeline.report.facts["tokens"] // 15 == len(source)


def test_resume_workers_and_seed(folder: Path, tmp_path: Path):
    cfg = config()
    whole = first(open_data(str(folder), cfg), 60)
    rest = first(open_data(str(folder), cfg), 10, start=Position(whole[50].epoch, 0))
    begin = [b.epoch for b in whole].index(whole[50].epoch)
    assert whole[50].epoch > 0
    for a, b in zip(whole[begin:], rest, strict=False):
        assert torch.equal(a.source, b.source) and torch.equal(a.ids, b.ids)
    shared = open_data(str(folder), config(workers=2))
    shared.workers = 2
    assert all(torch.equal(a.source, b.source) for a, b in zip(whole, first(shared, 5), strict=False))
    other = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=7))
    assert not torch.equal(first(open_data(str(folder), other))[0].source, whole[0].source)


def test_the_stream_is_made_once_and_again_when_a_file_changes(folder: Path, cache: Path):
    def streams() -> set[Path]:
        return set((cache / "text").iterdir())

    open_data(str(folder), config())
    once = streams()
    open_data(str(folder), config(block=32))
    assert streams() == once and len(once) == 1
    (folder / "deep" / "0.txt").write_text(prose(200, 5), encoding="utf-8")
    open_data(str(folder), config())
    assert len(streams()) == 2


def test_long_documents_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text(prose(400), encoding="utf-8")
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "x"))
    whole = first(open_data(str(tmp_path / "a.txt"), config()))[0]
    monkeypatch.setattr(records, "PIECE", 100)
    monkeypatch.setattr("d2v.data.text.pipeline.TOGETHER", 500)
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "y"))
    pieces = first(open_data(str(tmp_path / "a.txt"), config()))[0]
    assert torch.equal(whole.source, pieces.source)


def test_a_pickled_source_does_not_carry_the_tokens(folder: Path):
    pipeline = open_data(str(folder), config())
    pipeline.source.read(0, 0)
    assert len(pickle.dumps(pipeline.source)) < 2_000


def test_not_utf8_names_file_and_byte(tmp_path: Path):
    root = tmp_path / "data"
    root.mkdir()
    for i in range(150):
        (root / f"{i:03}.txt").write_text(prose(16, i), encoding="utf-8")
    (root / "007.txt").write_bytes(b"good line\nbad \xff line\n")
    pipeline = open_data(str(root), config())
    bad = {str(root / "007.txt"): "not UTF-8: invalid start byte at byte 14"}
    assert pipeline.report.unreadable == bad and pipeline.report.total == 150
    assert open_data(str(root), config()).report.unreadable == bad  # also when the stream is there already
    assert check_data(str(root), config()).unreadable == bad
    (root / "lines.jsonl").write_bytes(b'{"text": "a"}\n\n{"text": "\xe9"}\n{"other": 1}\nno json\n')
    with pytest.raises(DataError, match=r"4 of 154 samples unreadable, more than 0") as error:
        open_data(str(root), config(max_unreadable=0.0))
    for expected in (
        "007.txt: not UTF-8: invalid start byte at byte 14",
        "lines.jsonl:3: not UTF-8: invalid continuation byte at byte 25",
        'lines.jsonl:4: not an object with a string "text"',
        "lines.jsonl:5: not JSON",
    ):
        assert expected in str(error.value)


def test_nothing_to_read(tmp_path: Path):
    with pytest.raises(DataError, match="no text in it; known: .txt, .jsonl, .csv, .tsv, "):
        open_data(str(tmp_path), config())
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match=r"tokens are less than one block; data.block is 16"):
        open_data(str(tmp_path), config())
    with pytest.raises(ValueError, match=r"data.block must be in 4..64 \(front.max_positions\), got 65"):
        open_data(str(tmp_path), config(block=65))
    with pytest.raises(ValueError, match=r"data.block must be in 4..64 \(front.max_positions\), got 3"):
        open_labelled("text", config(block=3))


def test_training_a_tokenizer_is_repeatable_and_byte_level():
    texts = [prose(300, i) for i in range(3)]
    one, two = (train_tokenizer(iter(texts), 320) for _ in range(2))
    assert one.to_str() == two.to_str() and one.get_vocab_size() == 320
    assert [one.token_to_id(s) for s in SPECIALS] == [0, 1, 2, 3]
    odd = "日本語 \u0000 🙂 tab\t"
    assert one.decode(one.encode(odd).ids) == odd
    with pytest.raises(ValueError, match="front.vocab_size must be at least 260"):
        train_tokenizer(iter(texts), 259)


def test_text_that_looks_like_a_special_token_stays_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("<s> <pad> </s> <unk> " * 40)
    source = torch.cat([b.source for _, b in open_data(str(tmp_path), config()).in_order(50)])
    assert (source[:, 1:] >= len(SPECIALS)).float().mean() > 0.99


def gpt2(folder: Path, order: list[int] | None = None) -> Path:
    """GPT-2's file formats with the 256 bytes and two merges; `order` makes fairseq's dict.txt."""
    from tokenizers import pre_tokenizers

    folder.mkdir()
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n", encoding="utf-8")
    if order is not None:
        (folder / "dict.txt").write_text("".join(f"{i} {1000 - n}\n" for n, i in enumerate(order)))
    return folder


def test_gpt2_files_with_and_without_fairseqs_dictionary(tmp_path: Path):
    (tmp_path / "a.txt").write_text("the th " * 100)
    raw = json.loads((gpt2(tmp_path / "plain") / "vocab.json").read_text(encoding="utf-8"))
    order = list(reversed(range(259)))
    gpt2(tmp_path / "fairseq", order)
    for name, expected in (("plain", raw["the"] + 4), ("fairseq", order.index(raw["the"]) + 4)):
        run = tmp_path / f"run_{name}"
        pipeline = open_data(str(tmp_path / "a.txt"), config(tokenizer=str(tmp_path / name)), run_dir=run)
        (_, batch), *_ = pipeline.in_order(1)
        assert batch.source[0, :2].tolist() == [BOS, expected]
        # the run's copy is enough from then on
        again = open_data(str(tmp_path / "a.txt"), config(tokenizer="gone"), run_dir=run)
        assert torch.equal(next(again.in_order(1))[1].source, batch.source)
    gpt2(tmp_path / "lacking", order[1:])
    with pytest.raises(DataError, match=r"dict.txt lacks '<\|endoftext\|>' \(258\) of vocab.json"):
        open_data(str(tmp_path / "a.txt"), config(tokenizer=str(tmp_path / "lacking")))


def test_tokenizers_that_do_not_fit(tmp_path: Path):
    (tmp_path / "a.txt").write_text(prose(400), encoding="utf-8")
    path = str(tmp_path / "a.txt")
    train_tokenizer(iter([prose(400)]), 320).save(str(tmp_path / "large.json"))
    with pytest.raises(DataError, match=r"large.json has 320 tokens, front.vocab_size is 300"):
        open_data(path, config(tokenizer=str(tmp_path / "large.json")))
    assert len(first(open_data(path, config(vocab_size=320, tokenizer=str(tmp_path / "large.json"))))) == 1
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="bad.json: not a readable tokenizer"):
        open_data(path, config(tokenizer=str(tmp_path / "bad.json")))
    with pytest.raises(DataError, match="data.tokenizer gone does not exist"):
        open_data(path, config(tokenizer="gone"))
    other = train_tokenizer(iter([prose(400)]), 290).to_str().replace('"<pad>"', '"[PAD]"')
    (tmp_path / "other.json").write_text(other, encoding="utf-8")
    with pytest.raises(DataError, match="other.json must have <pad> as id 1, has None"):
        open_data(path, config(tokenizer=str(tmp_path / "other.json")))
    (gpt2(tmp_path / "broken") / "merges.txt").write_text("no such\n")
    with pytest.raises(DataError, match="broken: not GPT-2's vocab.json and merges.txt"):
        open_data(path, config(tokenizer=str(tmp_path / "broken")))


def test_labelled_lines(folder: Path, tmp_path: Path):
    labelled = open_labelled(str(folder), config(), run_dir=tmp_path / "run")
    assert labelled.classes == ["0", "1"] and labelled.level == "sample"
    assert {name: len(split) for name, split in labelled.splits.items()} == {"train": 8, "test": 2}
    again = open_labelled(str(folder), config(), run_dir=tmp_path / "run")
    for name, split in labelled.splits.items():
        for a, b in zip(split.batches(3), again.splits[name].batches(3), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    source, padding, labels = next(labelled.splits["train"].batches(8))
    assert source.shape == padding.shape and source.shape[1] <= 16 and labels.shape == (8,)
    assert (source[:, 0] == BOS).all() and torch.equal(padding, source == PAD)
    assert ((source == EOS).sum(1) == 1).all()
    features, labels = labelled.splits["test"].raw()
    assert features.dtype == np.float32 and features.shape == (2, labelled.splits["train"].raw()[0].shape[1])


def test_bag_of_tokens_counts(tmp_path: Path):
    for part, texts in {"train": ["aab", "b"], "test": ["bbbz"]}.items():
        lines = [json.dumps({"text": t, "label": t[0]}) for t in texts]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    train_tokenizer(iter([]), 260).save(str(tmp_path / "bytes.json"))
    labelled = open_labelled(str(tmp_path), config(tokenizer=str(tmp_path / "bytes.json")))
    tokenizer = load_tokenizer(tmp_path / "bytes.json")
    columns = labelled.splits["test"].counted.tolist()
    assert columns == sorted([BOS, EOS, tokenizer.token_to_id("a"), tokenizer.token_to_id("b")])
    assert labelled.splits["train"].raw()[0].tolist() == [[1, 1, 2, 1], [1, 1, 0, 1]]
    assert labelled.splits["test"].raw()[0].tolist() == [[1, 1, 0, 3]]  # z is not in the training part
    assert labelled.splits["test"].raw()[1].tolist() == [1]
    (tmp_path / "test.jsonl").write_text('{"text": "q", "label": "q"}')
    with pytest.raises(DataError, match="class 'q' of part test is not among the training classes"):
        open_labelled(str(tmp_path), config())


def test_labels_missing(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"labels missing: .*0.txt: labels come from .jsonl lines"):
        open_labelled(str(folder / "deep" / "0.txt"), config())
    with (folder / "lines.jsonl").open("a") as file:
        file.write('{"text": "no label"}\n')
    with pytest.raises(DataError, match=r"labels missing: .*lines.jsonl:12 has no \"label\""):
        open_labelled(str(folder), config())


def test_check_counts_and_measures(folder: Path):
    report = check_data(str(folder), config())
    assert report.total == 13 and not report.unreadable
    histogram = report.facts["documents by characters"]
    assert sum(histogram.values()) == 13
    assert histogram["below 512"] + histogram.get("below 1024", 0) == 3


def test_pieces_of_a_source_file(tmp_path: Path):
    source = '''"""Module text."""
# A comment over
#   two lines
x = """
# not a comment, inside a string
"""  # at the end of a line: left out

def f():
    """Function text.

    More of it."""
    # last one
'''
    (tmp_path / "m.py").write_text(source)
    text = stdlib._prose(tmp_path / "m.py")
    assert text == "Module text.\n\nA comment over\n  two lines\n\nFunction text.\n\nMore of it.\n\nlast one"


@pytest.mark.slow
def test_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    documents = stdlib.documents()
    names = [name for name, _ in documents]
    assert "argparse.py" in names and not any(n.startswith("test/") or "site-packages" in n for n in names)
    assert 2e6 < sum(len(text) for _, text in documents) < 8e6
    letters = sum(c.isascii() for _, text in documents[:50] for c in text)
    assert letters > 0.99 * sum(len(text) for _, text in documents[:50])
    parts = stdlib.paragraphs()
    (train, train_areas), (test, areas) = parts["train"], parts["test"]
    assert len(train) > 3_000 and len(test) > 1_000 and len(train) == len(train_areas)
    shares = np.unique(areas, return_counts=True)[1] / len(areas)
    assert len(shares) >= 8 and shares.max() < 0.3 and shares.min() > 0.03
    assert len(set(test) & set(train)) < 0.02 * len(test)  # the same words in two files

    monkeypatch.setattr(stdlib, "documents", lambda: documents[:80])
    cfg = preset("text_tiny")
    pipeline = open_data("text", cfg, run_dir=tmp_path / "run")
    batch = first(pipeline, micro=16)[0]
    assert batch.source.shape == (16, 128) and batch.source.max() < 4_096
    assert pipeline.report.facts["tokens"] > 50_000
    labelled = open_labelled("text", cfg, run_dir=tmp_path / "run")
    source, padding, labels = next(labelled.splits["test"].batches(64))
    assert labels.max() < len(labelled.classes) and padding.any() and source.shape[1] <= 128
