"""Labelled texts as people have them: tables with other columns, odd labels, GLUE as it is published."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2v.config.run import DataConfig
from d2v.data.text.labelled import Sentence, read_labelled
from d2v.data.text.sentences import targets_of
from d2v.data.types import DataError, Report
from tests.d2v.tiny_runs import LINES

QQP = ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\ta?\tb?\t0", "1\t2\t3\tc\td\t1"]


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def glue(folder: Path, lines: list[str], task: str, data: bytes = b"") -> tuple[list[Sentence], Report]:
    """The training part of a task's folder, of which dev.tsv has the first lines alone."""
    write(folder / "dev.tsv", "\n".join(lines[:3]))
    write(folder / "train.tsv", data or "\n".join(lines))
    found, report = read_labelled(str(folder), task)
    return found["train"], report


def test_malformed_lines_of_qqp_are_left_out_as_in_fairseq(tmp_path: Path) -> None:
    """preprocess_GLUE_tasks.sh keeps lines of six fields."""
    found, report = glue(tmp_path, [*QQP, "1\t2\t3\tonly", "1\t2\t3\ta\tb\tc\t1", "1\t2\t3\te\tf\t0"], "qqp")
    assert [sentence.texts for sentence in found] == [("a?", "b?"), ("c", "d"), ("e", "f")]
    assert (
        [len(some) for some in report.skipped.values()] == [2]
        and "not 6 columns" in report.skipped
        and not report.unreadable
        and report.total == 7
    )


def test_marks_of_mrpc_and_long_fields(tmp_path: Path) -> None:
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tA "b\tC d', "0\t7\t8\te\tf"]
    lines += ["1\t7\t8\t" + "x" * 200_000 + "\ta\x0cb\x85c\u2028d\re"]
    found, _ = glue(tmp_path, lines, "mrpc", codecs.BOM_UTF8 + "\r\n".join(lines).encode())
    assert found[0] == Sentence(('A "b', "C d"), "1")
    assert [len(text) for text in found[2].texts] == [200_000, 9] and found[2].label == "1"


def test_other_encodings_of_glue_are_named(tmp_path: Path) -> None:
    lines = ["sentence\tlabel", *(f"text {n}\t{n % 2}" for n in range(300))]
    data = "\n".join([*lines, "na\xefve\t1"]).encode("latin-1")
    found, report = glue(tmp_path, lines, "sst2", data)
    place = data.index(b"na\xef") + 2
    said = f"not UTF-8: invalid continuation byte at byte {place}"
    assert report.unreadable == {f"{tmp_path / 'train.tsv'}:302": said}
    assert len(found) == 300 and report.total == 303
    with pytest.raises(DataError, match=r"train.tsv: UTF-16, not UTF-8: a byte order mark at byte 0"):
        glue(tmp_path, lines, "sst2", "\n".join(lines).encode("utf-16"))


def test_short_lines_and_labels_that_are_none(tmp_path: Path) -> None:
    lines = ["index\tsentence1\tsentence2\tscore", "0\ta\tb\t2.5", "1\tc\td\t5"]
    many = [*lines, *(f"{n}\ta\tb\t1" for n in range(200)), "7\tshort"]
    found, report = glue(tmp_path, many, "stsb")
    assert len(found) == 202 and list(report.unreadable.values()) == ["2 columns, 4 are needed"]
    for label in ("nan", "inf", "x", ""):
        with pytest.raises(DataError, match=rf"train.tsv:4: the label must be a number, got '{label}'"):
            glue(tmp_path, [*lines, f"2\te\tf\t{label}"], "stsb")
    lines = ["index\tsentence1\tsentence2\tgold_label", "0\ta\tb\tneutral", "1\tc\td\t-", "2\te\tf\tneutral"]
    write(tmp_path / "dev_matched.tsv", "\n".join(lines))
    write(tmp_path / "dev_mismatched.tsv", "\n".join(lines))
    found, report = glue(tmp_path, lines, "mnli")
    assert len(found) == 2 and len(report.skipped["label -: annotators did not agree"]) == 3


@pytest.mark.parametrize("label", [True, None, [1], {"a": 1}, "", float("nan"), float("inf")])
def test_labels_that_are_none_are_refused_by_line(label: Any, tmp_path: Path) -> None:
    lines = [{"text": "a", "label": "1"}, {"text": "b", "label": label}]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    for numbers in (False, True):
        with pytest.raises(DataError, match=r"a.jsonl:2"):
            read_labelled(str(file), numbers=numbers)


def test_labels_of_one_class_are_one(tmp_path: Path) -> None:
    """1, 1.0 and "1"."""
    values = [1, 1.0, "1", 0, "0", 0.0, 2.5, "x", 1e300] * 2
    lines = [json.dumps({"text": "t", "label": value}) for value in values]
    found, _ = read_labelled(str(write(tmp_path / "a.jsonl", "\n".join(lines))))
    assert {s.label for part in found.values() for s in part} == {"1", "0", "2.5", "x", "1e+300"}
    lines = [json.dumps({"text": "t", "label": value}) for value in (1, 2.0, "2.5", "1e3", -0.5)]
    found, _ = read_labelled(str(write(tmp_path / "a.jsonl", "\n".join(lines))), numbers=True)
    numbers = [targets_of(part, True).encode(part, "") for part in found.values()]
    assert sorted(np.concatenate(numbers).tolist()) == [-0.5, 1, 2, 2.5, 1000]
    lines = [json.dumps({"text": "t", "label": value}) for value in (1, "x")]
    with pytest.raises(DataError, match=r"a.jsonl:2: the label must be a number, got 'x'"):
        read_labelled(str(write(tmp_path / "a.jsonl", "\n".join(lines))), numbers=True)


TABLES = {
    "csv": 'body,text2,class\n"a, b",c,0\nd,e,1\n',
    "tsv": "body\ttext2\tclass\na, b\tc\t0\nd\te\t1\n",
    "jsonl": '{"body": "a, b", "text2": "c", "class": 0}\n{"body": "d", "text2": "e", "class": 1.0}\n',
}


@pytest.mark.parametrize("kind", [*TABLES, "csv.gz", "jsonl.gz", "parquet"])
def test_other_columns_and_files_hold_the_same(kind: str, tmp_path: Path) -> None:
    for part in ("train", "dev"):
        file = tmp_path / f"{part}.{kind}"
        if kind == "parquet":
            pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
            parquet = pytest.importorskip("pyarrow.parquet")
            columns = {"body": ["a, b", "d"], "text2": ["c", "e"], "class": [0, 1], "other": [None, b"x"]}
            parquet.write_table(pyarrow.table(columns), file)
        else:
            data = TABLES[kind.removesuffix(".gz")].encode()
            write(file, gzip.compress(data) if kind.endswith(".gz") else data)
    found, report = read_labelled(str(tmp_path), data=DataConfig(text_column="body", label_column="class"))
    assert found["train"] == [Sentence(("a, b", "c"), "0"), Sentence(("d", "e"), "1")]
    assert found["train"] == found["dev"] and report.total == 4 and not report.unreadable
    with pytest.raises(DataError, match="\"text\"|column 'text'"):
        read_labelled(str(tmp_path))
    with pytest.raises(
        DataError, match=r"labels missing: .*dev.* has no \"label\"|labels missing: .*train.* has no"
    ):
        read_labelled(str(tmp_path), data=DataConfig(text_column="body"))


def test_header_only_tables(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\na,b\n")
    write(tmp_path / "test.csv", "text,label\n")
    with pytest.raises(DataError, match="part test holds no sample"):
        read_labelled(str(tmp_path))


def test_tests_without_labels_are_left_out_by_name(tmp_path: Path) -> None:
    """As those of GLUE; where it is the part to train on, that is an error."""
    for part in ("train", "dev"):
        write(tmp_path / f"{part}.tsv", "sentence\tlabel\na\t0\nb\t1\n")
    bare = write(tmp_path / "test.tsv", "index\tsentence\n0\ta\n1\tb\n")
    data = DataConfig(text_column="sentence")
    found, report = read_labelled(str(tmp_path), data=data)
    assert list(found) == ["train", "dev"] and report.total == 4
    assert report.left_out == {"held out without a column 'label'": [str(bare)]}
    write(tmp_path / "train.tsv", "index\tsentence\n0\ta\n1\tb\n")
    with pytest.raises(DataError, match=r"labels missing: .*train.tsv:2"):
        read_labelled(str(tmp_path), data=data)


def test_what_is_left_out_is_said_with_the_scores(tmp_path: Path) -> None:
    from d2v.config.presets import preset
    from d2v.data.open import open_labelled
    from d2v.data.types import unused

    lines = [json.dumps({"text": LINES[n % 4], "label": n % 2}) for n in range(30)]
    write(tmp_path / "a.jsonl", "\n".join([*lines, "no json"]))
    parts = open_labelled(str(tmp_path), preset("text_tiny"), run_dir=tmp_path / "run").splits
    (line,) = unused(parts.values())
    assert line.startswith(f"unreadable {tmp_path / 'a.jsonl'}:31: not JSON")


def test_second_texts_are_texts(tmp_path: Path) -> None:
    for second in (1, [], "\ud800"):
        line = json.dumps({"text": "a", "text2": second, "label": "x"})
        with pytest.raises(DataError, match=r'a.jsonl:1: .*"text2"'):
            read_labelled(str(write(tmp_path / "a.jsonl", line)))
