"""The benchmark of reading data: a row for every kind and way, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_data
from benchmarks.report import Results


def test_every_kind_is_read_in_all_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """This version stands for another, too."""
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    out, here = tmp_path / "data_cpu.json", Path(bench_data.__file__).parents[1]
    options = ["--smoke", "--seconds", "0", "--rounds", "1", "--out", str(out), "--against", str(here)]
    assert bench_data.main(options) == 0
    found = Results(out, json.loads(out.read_text()))
    kinds = [*bench_data.PICTURES, "FLAC", "Ogg Vorbis", "MP3", "WAV"]
    kinds += ["text, blocks of 512", "text, tokenised"]
    rows = found.data["rows"]
    assert [(row["kind"], row["variant"]) for row in rows] == [
        (kind, variant) for kind in kinds for variant in ("ours", "plain", "before")
    ]
    assert all([row["per_second"]] == row["rounds"] > [0] for row in rows)
    with_it = bench_data.data_table(found)
    rows[:] = [row for row in rows if row["variant"] != "before"]
    assert len(with_it) == len(bench_data.data_table(found)) == len(kinds) + 2
    assert with_it[0].count("|") == bench_data.data_table(found)[0].count("|") + 2
    assert capsys.readouterr().out.count(" here, ") == len(kinds)
