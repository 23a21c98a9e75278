"""Files of texts as people have them: huge, damaged, compressed, tables, in other encodings; all counted."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import sys
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest

from d2v.data.open import guess_modality
from d2v.data.text import corpus, records, tokenizer
from d2v.data.text.corpus import Files, open_corpus
from d2v.data.text.labelled import read_labelled
from d2v.data.text.tokenizer import encode_beginnings, train_tokenizer
from d2v.data.types import DataError, Report

PROSE = "a quick brown fox jumps over the lazy dog. "


def read(path: Path, column: str = "text") -> tuple[list[str], Report]:
    report = Report(str(path), 0)
    return [
        "".join(pieces) for pieces in open_corpus(str(path), report, column=column).documents(report)
    ], report


def unreadable(path: Path, column: str = "text") -> dict[str, str]:
    """Reasons by line, row or file name."""
    texts, report = read(path, column)
    assert len(texts) + len(report.unreadable) + sum(map(len, report.skipped.values())) == report.total
    return {name.removeprefix(str(path)): reason for name, reason in report.unreadable.items()}


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# what is large


@pytest.mark.parametrize("word", ["word ", "日本語", "aé", "\n", " \n", "x"])
def test_texts_are_cut_into_pieces_of_bounded_size(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long line, in a file and in JSON; nothing is lost."""
    monkeypatch.setattr(records, "PIECE", 1000)
    text = "begin" + word * (9_000 // len(word)) + "end"
    for file in (
        write(tmp_path / "a.txt", text),
        write(tmp_path / "a.jsonl", json.dumps({"text": text})),
        write(tmp_path / "a.csv", f'text\n"{text}"\n'),
    ):
        (document,) = (list(d) for d in open_corpus(str(file), Report("", 0)).documents(Report("", 0)))
        assert "".join(document) == text
        assert len(document) > 2 and max(map(len, document)) <= 2_000


def test_cuts_do_not_change_the_tokens_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PROSE * 100 + "\n  indented  words \tand tabs " * 50
    made = train_tokenizer(iter([text]), 400)
    whole = made.encode(text).ids
    monkeypatch.setattr(records, "PIECE", 500)
    assert [i for piece in records.cut(text) for i in made.encode(piece).ids] == whole
    file = write(tmp_path / "a.txt", text[: text.index("\n")])
    (pieces,) = (
        list(document) for document in open_corpus(str(file), Report("", 0)).documents(Report("", 0))
    )
    assert len(pieces) > 5
    ids = [i for piece in pieces for i in made.encode(piece).ids]
    assert ids == made.encode("".join(pieces)).ids and len("".join(pieces)) > 4_000


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv"])
def test_memory_does_not_grow_with_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PIECE", 1 << 16)
    monkeypatch.setattr(records, "LONGEST", 1 << 18)
    chunk = PROSE * 1000
    chunks: dict[str, tuple[str, str, str]] = {
        ".txt": ("", chunk, ""),
        ".jsonl": ('{"text": "', chunk, '"}\n'),
        ".csv": ('text\n"', chunk, '"\n'),
        ".tsv": ("text\n", chunk, "\n"),
    }
    begin, middle, end = chunks[records.kind_of(name)]
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
        file.write(begin)
        for _ in range(200):
            file.write(middle)
        file.write(end)
    tracemalloc.start()
    report = Report("", 0)
    count = sum(
        len(piece) for d in open_corpus(str(tmp_path / name), Report("", 0)).documents(report) for piece in d
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    if name.startswith("a.txt"):
        assert count == 200 * len(chunk) and not report.unreadable
    else:
        (reason,) = report.unreadable.values()
        assert count == 0 and reason == "a line of more than 262,144 bytes"


def test_long_lines_of_json_are_counted_and_the_next_ones_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST", 100)
    lines = [json.dumps({"text": "x" * n}) for n in (10, 88, 89, 300, 20)]
    file = write(tmp_path / "a.jsonl", "\n".join(lines))
    assert [len(line) for line in lines[1:3]] == [100, 101]
    texts, report = read(file)
    assert [len(text) for text in texts] == [10, 88, 20] and report.total == 5
    assert report.unreadable == dict.fromkeys((f"{file}:3", f"{file}:4"), "a line of more than 100 bytes")


def test_what_waits_for_the_tokenizer_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one document of many pieces, of many empty ones, and of labelled texts."""
    from d2v.data.text import pipeline

    made = train_tokenizer(iter([PROSE]), 270)
    together: list[int] = []

    class Watched:
        def encode_batch(self, texts: list[str], **options: bool) -> list:
            together.append(sum(map(len, texts)) + 64 * len(texts))
            return made.encode_batch(texts, **options)

        def encode(self, text: str, **options: bool) -> object:
            together.append(len(text))
            return made.encode(text, **options)

    monkeypatch.setattr(records, "PIECE", 1_000)
    monkeypatch.setattr(tokenizer, "PIECE", 1_000)
    for module in (pipeline, tokenizer):
        monkeypatch.setattr(module, "TOGETHER", 4_000)
    write(tmp_path / "a.txt", PROSE * 1_000)
    write(tmp_path / "b.jsonl", '{"text": "a"}\n' * 500)
    ids = pipeline._encode(open_corpus(str(tmp_path), Report("", 0)), Watched(), Report("", 0))  # type: ignore[arg-type]
    assert sum(map(len, ids)) > 10_000 and len(together) > 10
    for texts in ([PROSE * 1_000], ["a"] * 500):
        found = list(encode_beginnings(texts, Watched(), 16))  # type: ignore[arg-type]
        assert [some[:16] for some in found] == [made.encode(text).ids[:16] for text in texts]
    assert max(together) <= 4_000 + 2_064


def test_tokenizers_are_trained_on_a_sample_of_large_corpora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evenly spaced pieces; all of a corpus that is small enough."""
    import dataclasses

    from d2v.config.presets import preset
    from d2v.data.text import pipeline

    for number in range(8):
        write(tmp_path / f"{number}.txt", f"text {number} " + "x" * 93)
    cfg = preset("text_tiny")
    seen: list[list[str]] = []

    def trained(texts: Iterable[str], size: int) -> object:
        seen.append([text[5] for text in texts])
        return train_tokenizer(iter([PROSE]), 300)

    monkeypatch.setattr(pipeline, "train_tokenizer", trained)
    for limit in (800, 799, 200):
        monkeypatch.setattr(pipeline, "SAMPLE", limit)
        pipeline._tokenizer(
            open_corpus(str(tmp_path), Report("", 0)), dataclasses.replace(cfg), None, tmp_path / str(limit)
        )
    assert seen == [[*"01234567"], [*"0246"], [*"04"]]


# what is damaged


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (r'{"text": "a\ud800b"}', '"text" holds a lone surrogate, U+D800'),
        (
            '{"text": "a", "x": ' + "[" * 1_000_000 + "}",
            "not JSON that can be read: brackets in too many brackets",
        ),
        ('{"text": ' + "[" * 1_000_000 + "]" * 1_000_000 + "}", "not JSON that can be read: brackets in too"),
        ('{"text": "a", "label": ' + "7" * 5_000 + "}", "not JSON that can be read: Exceeds the limit"),
        ('{"text": "a", "text": "b"}', "not JSON that can be read: 'text' stands twice in an object"),
        ('"a"', "not an object of JSON"),
        ('["text"]', "not an object of JSON"),
        ("null", "not an object of JSON"),
        ('{"text": ["a"]}', 'not an object with a string "text"'),
        ('{"text": null}', 'not an object with a string "text"'),
        ('{"Text": "a"}', 'not an object with a string "text": --data.text-column may be Text'),
        ('{"text": "a"', "not JSON: "),
        ('{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
        ('{"text": "a\0"}', "not JSON: Invalid control character"),
        ("\0\0\0", "not JSON: "),
    ],
    ids=lambda value: value[:20],
)
def test_broken_lines_of_json_are_counted(line: str, reason: str, tmp_path: Path) -> None:
    if "limit" in reason and sys.version_info < (3, 10, 7):
        pytest.skip("this Python reads integers of any length")
    file = write(tmp_path / "a.jsonl", f'{{"text": "before"}}\n\n{line}\r\n{{"text": "after"}}')
    assert read(file)[0] == ["before", "after"]
    ((name, found),) = unreadable(file).items()
    assert name == ":3" and found.startswith(reason) and "\n" not in found and len(found) < 200


def test_lines_of_json_that_are_fine(tmp_path: Path) -> None:
    texts = ["a\u2028b\x85c", "\U0001f600", "a\0b", "x"]
    lines = [json.dumps({"text": t}, ensure_ascii=n % 2 == 0) for n, t in enumerate(texts)]
    lines[2] = lines[2].replace("}", ', "score": NaN, "n": {"text": 1}}')
    file = write(tmp_path / "a.jsonl", codecs.BOM_UTF8 + "\r\n".join(lines).encode() + b"\n \n")
    assert read(file)[0] == texts and unreadable(file) == {}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("text\nnaïve".encode("utf-16"), "UTF-16, not UTF-8: a byte order mark at byte 0"),
        ("text\nnaïve".encode("utf-32"), "UTF-32, not UTF-8: a byte order mark at byte 0"),
        (b'text\n{"text": "na\xefve"}\n', "not UTF-8: invalid continuation byte at byte 17"),
        (codecs.BOM_UTF8 + b"text\n\xff", "not UTF-8: invalid start byte at byte 8"),
        (b"text\nna\xc3", "not UTF-8: unexpected end of data at byte 7"),
    ],
)
def test_other_encodings_are_named_with_file_and_byte(
    name: str, data: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for piece in (1 << 20, 4):
        monkeypatch.setattr(records, "PIECE", piece)
        found = unreadable(write(tmp_path / name, data))
        assert said in found.values()


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    for name, data in {
        "a.txt": "b",
        "a.jsonl": '{"text": "b"}',
        "a.csv": "text\nb",
        "a.tsv": "text\nb",
    }.items():
        assert read(write(tmp_path / name, codecs.BOM_UTF8 + data.encode()))[0] == ["b"]


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "\n\r\n \n")
    write(tmp_path / "c.txt", codecs.BOM_UTF8)
    write(tmp_path / "g.txt", "\n" * (records.PIECE * 5 // 2))
    write(tmp_path / "d.jsonl", '{"text": ""}\n{"text": "d"}\n')
    write(tmp_path / "e.csv", "text,n\n,1\n")
    write(tmp_path / "f.jsonl", "")
    texts, report = read(tmp_path)
    assert texts == ["d"] and report.total == 7 and not report.unreadable
    assert [*map(len, report.skipped.values())] == [6] and "empty" in report.skipped


# what is compressed


@pytest.mark.parametrize("damage", ["cut", "changed", "no gzip"])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_damaged_archives_are_named(name: str, damage: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{n} {n * n}"}) + "\n" for n in range(5_000))
    packed = bytearray(gzip.compress(lines.encode()))
    if damage == "cut":
        del packed[-2_000:]
    elif damage == "changed":
        packed[len(packed) // 2] ^= 255
    else:
        packed = bytearray(b"plain text")
    found = unreadable(write(tmp_path / name, bytes(packed)))
    assert "" in found and any(word in found[""] for word in ("EOFError", "error", "BadGzipFile"))


def test_compressed_files_of_several_members(tmp_path: Path) -> None:
    parts = [gzip.compress(b'{"text": "a"}\n'), gzip.compress(b'{"text": "b"}\n')]
    assert read(write(tmp_path / "A.JSONL.GZ", b"".join(parts)))[0] == ["a", "b"]


def test_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zstd = pytest.importorskip("backports.zstd", reason="backports.zstd is not installed")
    packed = zstd.compress(b'{"text": "a"}\n') + zstd.compress(b'{"text": "b"}\n' * 1000)
    assert len(read(write(tmp_path / "a.jsonl.zst", packed))[0]) == 1001
    assert read(write(tmp_path / "a.txt.zst", zstd.compress(b"text")))[0] == ["text"]
    assert "" in unreadable(write(tmp_path / "b.jsonl.zst", packed[:-5]))
    assert "" in unreadable(write(tmp_path / "c.txt.zst", b"plain"))


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("backports.zstd", "backports", "compression.zstd", "pyarrow"):
        monkeypatch.setitem(sys.modules, library, None)
    for name, library in {"a.jsonl.zst": "backports.zstd", "a.parquet": "pyarrow"}.items():
        with pytest.raises(DataError, match=rf'{name}: .* needs {library}: pip install "d2vkern\[texts\]"$'):
            read(write(tmp_path / name, b"x"))


# tables


def test_tables(tmp_path: Path) -> None:
    """Quotes and line ends in a field of .csv; in .tsv quotes are text."""
    file = write(tmp_path / "a.csv", 'n, text \r\n1,"a, ""b""\nc"\r\n\r\n2,d\n3,"e\r\nf"\n')
    assert read(file)[0] == ['a, "b"\nc', "d", "e\r\nf"]
    file = write(tmp_path / "b.tsv", 'title\tbody\n1\t"a" \x0c\u2028b\rc\n2\t"d\n')
    assert read(file, "body")[0] == ['"a" \x0c\u2028b\rc', '"d']
    long = "x" * 200_000
    assert read(write(tmp_path / "c.csv", f"text\n{long}\n"))[0] == [long]
    assert read(tmp_path, "text")[1].unreadable == {
        str(file): "has no column 'text', its columns: title, body (--data.text-column chooses one)"
    }


@pytest.mark.parametrize(
    ("name", "table", "found"),
    [
        ("a.csv", "", {"": "empty: a table begins with the names of its columns"}),
        ("a.csv", "\n\n", {"": "empty: a table begins with the names of its columns"}),
        ("a.csv", "text,label\n", {}),
        ("a.csv", "text,text\na,b\n", {"": "has 2 columns 'text', its columns: text, text"}),
        ("a.csv", "text,n\na,b,1\nc,1\nd\n", {":2": "3 columns, the", ":4": "1 columns, the"}),
        ("a.tsv", "text\tn\na\tb\t1\nc\t1\n", {":2": "3 columns, the header has 2"}),
        ("a.csv", 'text,n\n"a"b,1\nc,1\n', {":2": "not a row of .csv: "}),
        ("a.csv", 'text,n\nc,1\n"open,1\nd,2\n', {":3": "not a row of .csv: unexpected end of data"}),
    ],
)  # fmt: skip
def test_odd_tables(name: str, table: str, found: dict[str, str], tmp_path: Path) -> None:
    reasons = unreadable(write(tmp_path / name, table))
    assert reasons.keys() == found.keys()
    assert all(reasons[where].startswith(found[where]) for where in found)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "file of arrow"])
def test_columns_on_disk(kind: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"body": ["a", None, "c"], "label": [0, 1, 1]})
    file = tmp_path / f"a.{kind.split()[-1]}"
    if kind == "parquet":
        parquet.write_table(table, file)
    else:
        new = pyarrow.ipc.new_stream if kind == "arrow" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(file), "wb") as opened, new(opened, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    assert read(file, "body")[0] == ["a", "c"]
    assert unreadable(file, "body") == {", row 2": 'not an object with a string "body"'}
    assert "has no column 'text', its columns: body, label" in unreadable(file)[""]
    data = file.read_bytes()
    assert "" in unreadable(write(tmp_path / f"b{file.suffix}", data[: len(data) // 2]))
    assert "" in unreadable(write(tmp_path / f"c{file.suffix}", b""))


def test_what_is_read(tmp_path: Path) -> None:
    names = [
        "a.TXT",
        "b.Jsonl.GZ",
        "c.csv.zst",
        "d.tsv",
        "e.parquet",
        "f.json",
        "g.gz",
        "h.parquet.gz",
        "i.zst",
    ]
    assert [name for name in names if records.kind_of(name)] == names[:5]
    with pytest.raises(
        DataError, match=r"no text in it; known: \.txt, \.jsonl, \.csv, \.tsv, \.arrow, \.parquet"
    ):
        open_corpus(str(write(tmp_path / "f.json", "{}")), Report("", 0))
    assert corpus.EXTENSIONS is records.EXTENSIONS


def tar_of(path: Path, **members: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("form", ["txt", "json", "jsonl"])
def test_texts_in_tars_are_those_of_files(form: str, tmp_path: Path) -> None:
    """Beside a .txt a .json describes it; what cannot be read is named."""
    texts = [f"the text of number {i} " * 40 for i in range(6)]
    (tmp_path / "files").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "files" / f"{i}.txt").write_text(text)
    lines = [json.dumps({"text": text}).encode() for text in texts]
    if form == "txt":
        members = {f"{i}.txt": text.encode() for i, text in enumerate(texts)}
        members |= {"0.json": b"{}", "6.txt": b"\xff", "7.txt": b" "}
    elif form == "json":
        members = {f"{i}.json": line for i, line in enumerate(lines)}
        members |= {"6.json": b"[", "7.json": b'{"text": " "}'}
    else:
        members = {
            "a.jsonl": b"\n".join(lines[:4]),
            "b.jsonl": b"\n".join([*lines[4:], b"[", b'{"text": ""}']),
        }
    (tmp_path / "tars").mkdir()
    tar_of(tmp_path / "tars" / "train-0.tar", **members)
    report = Report(str(tmp_path), 0)
    found = Files(str(tmp_path / "tars"), report)
    assert ["".join(pieces) for pieces in found.documents(report)] == texts
    assert report.total == 8 and len(report.unreadable) == 1
    (name,) = report.unreadable
    assert name.startswith(f"{tmp_path}/tars/train-0.tar:") and [len(x) for x in report.skipped.values()] == [
        1
    ]
    assert guess_modality(str(tmp_path / "tars")) == "text" and found.size() >= sum(map(len, texts))
    with pytest.raises(DataError, match="labels missing"):
        read_labelled(str(tmp_path / "tars"))
