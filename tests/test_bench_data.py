"""The benchmark of reading data: a row for every kind and way, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_data
from benchmarks.report import Results


def test_every_kind_is_read_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "data_cpu.json"
    assert bench_data.main(["--smoke", "--seconds", "0", "--rounds", "1", "--out", str(out)]) == 0
    found = Results(out, json.loads(out.read_text()))
    kinds = [*bench_data.PICTURES, "FLAC", "Ogg Vorbis", "MP3", "WAV", "text, blocks of 512"]
    assert [row["kind"] for row in found.data["rows"][::2]] == kinds
    assert all(row["per_second"] > 0 for row in found.data["rows"])
    assert len(bench_data.data_table(found)) == len(kinds) + 2
    assert capsys.readouterr().out.count("here (") == len(kinds)
