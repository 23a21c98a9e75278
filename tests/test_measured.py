"""Auto by measured times: it follows the table, requests win, broken tables say where; writing the table."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import d2vkern
from benchmarks import choose, memory
from d2vkern import _backend, _cpu, _measured, info
from d2vkern._backend import BackendError
from d2vkern._measured import TABLE, attention_bucket, record_buckets
from d2vkern.testing import backend_spy

QKV = torch.zeros(2, 40, 3, 2, 8)
BUCKET = "float32 S64 Dh8 forward"
Write = Callable[..., Path]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """`table({bucket: times})` is what was measured here for attention; or `table(text="...")`."""
    path = tmp_path / "measured.json"

    def write(buckets: dict[str, Any] | None = None, text: str | None = None) -> Path:
        content = {_measured.machine("cpu"): {"ops": {"attention": buckets}}}
        path.write_text(json.dumps(content) if text is None else text)
        _measured.read_table.cache_clear()
        return path

    monkeypatch.setattr(_measured, "TABLE", path)
    monkeypatch.setattr(_backend, "_announced", set())
    write({})
    yield write
    _measured.read_table.cache_clear()


def used(qkv: Tensor = QKV, **given: Any) -> str:
    with backend_spy() as calls:
        d2vkern.multimask_attention(qkv, **given)
    ((_, name),) = calls
    return name


def test_auto_takes_the_fastest_and_says_why(table: Write, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="d2vkern"):
        table({BUCKET: {"eager": 90.0, "sdpa": 30.0}})
        assert used() == "sdpa"
        assert used() == "sdpa"
        assert used(torch.zeros(2, 80, 3, 2, 8)) == "eager"
        table({BUCKET: {"eager": 20.0, "sdpa": 30.0}})
        assert used() == "eager"
    where = f"measured: {_measured.machine('cpu')}, {BUCKET}"
    assert [record.getMessage() for record in caplog.records] == [
        f"attention: auto chose backend sdpa ({where})",
        "attention: auto chose backend eager (not measured)",
        f"attention: auto chose backend eager ({where})",
    ]


def test_what_cannot_run_is_passed_over(table: Write) -> None:
    table({BUCKET: {"xformers": 1.0, "flex": 2.0, "eager": 9.0}})
    assert used() == "flex"
    table({f"{BUCKET.removesuffix('forward')}dropout forward": {"flex": 1.0, "sdpa": 2.0, "eager": 9.0}})
    assert used(dropout_p=0.1, seed=3) == "eager"
    assert used(dropout_p=0.1) == "sdpa"


def test_requests_win(table: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    table({BUCKET: {"eager": 90.0, "sdpa": 30.0}})
    assert used(backend="eager") == "eager"
    with d2vkern.use_backend(attention="eager"):
        assert used() == "eager"
    monkeypatch.setenv("D2VKERN_BACKEND", "attention=eager")
    assert used() == "eager"


def test_traced_calls_do_not_look(table: Write) -> None:
    table({BUCKET: {"eager": 90.0, "sdpa": 30.0}})
    torch._dynamo.reset()
    with backend_spy() as calls:
        torch.compile(lambda x: d2vkern.multimask_attention(x), fullgraph=True, backend="eager")(QKV)
    assert calls == [("attention", "eager")]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "forward"),
        ({"grad": True}, "train"),
        ({"slopes": True}, "alibi forward"),
        ({"slopes": True, "scale": True}, "alibi train"),
        ({"lengths": True, "dropout_p": 0.1}, "lengths dropout forward"),
    ],
)
def test_buckets(given: dict[str, Any], expected: str) -> None:
    qkv = torch.zeros(3, 41, 3, 2, 16, dtype=torch.bfloat16, requires_grad="grad" in given)
    call = {
        "slopes": torch.ones(2) if "slopes" in given else None,
        "alibi_scale": torch.ones(2, requires_grad=True) if "scale" in given else None,
        "lengths": torch.ones(3, dtype=torch.int32) if "lengths" in given else None,
        "dropout_p": given.get("dropout_p", 0.0),
    }
    assert attention_bucket(qkv, **call) == f"bfloat16 S64 Dh16 {expected}"
    with torch.no_grad():
        assert attention_bucket(qkv, **call).endswith("forward")


@pytest.mark.parametrize(
    ("buckets", "words"),
    [
        ({BUCKET: {"eager": "fast"}}, f"attention, {BUCKET}, eager must be microseconds, got 'fast'"),
        ({BUCKET: {"eager": 0}}, "eager must be microseconds, got 0"),
        ({BUCKET: {"eager": True}}, "eager must be microseconds, got True"),
        ({BUCKET: ["sdpa", "eager"]}, f"attention, {BUCKET} must be an object, got "),
        ([], "ops, attention|attention must be an object"),
    ],
    ids=["word", "zero", "bool", "list", "no buckets"],
)
def test_a_broken_table_says_where(table: Write, buckets: Any, words: str) -> None:
    table(buckets)
    with pytest.raises(ValueError, match=words) as error:
        used()
    assert str(error.value).startswith("measured.json: ")
    assert used(backend="eager") == "eager"


def test_an_unknown_backend_and_a_torn_file_say_where(table: Write) -> None:
    table({BUCKET: {"spda": 1.0}})
    with pytest.raises(
        BackendError, match="unknown backend 'spda' in measured.json, cpu .*did you mean 'sdpa'"
    ):
        used()
    table(text='{"cpu": ')
    with pytest.raises(ValueError, match="measured.json: must be JSON, got "):
        used()


def test_the_shipped_table_is_sound() -> None:
    names = set(_backend.backend_names("attention"))
    for part in _measured.read_table(TABLE).values():
        assert {"torch", "date", "load before", "load after"} <= set(part["about"])
        assert set(part["ops"]) <= set(_measured.BUCKETS)
        for times in part["ops"]["attention"].values():
            assert len(times) > 1 and set(times) <= names


def test_processors_of_another_make_are_other_machines(table: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    table({BUCKET: {"sdpa": 123.4, "eager": 200.0}})
    here = _measured.machine("cpu")
    assert here.split()[1:2] == [torch.backends.cpu.get_cpu_capability().split()[0]]
    assert _measured.times_of(here)
    _measured.machine.cache_clear()
    try:
        monkeypatch.setattr(_cpu, "processor", lambda: _cpu.Processor("CentaurHauls", 7))
        elsewhere = _measured.machine("cpu")
        assert elsewhere.endswith(" CentaurHauls 7") and not _measured.times_of(elsewhere)
        _measured.machine.cache_clear()
        monkeypatch.setattr(_cpu, "processor", _cpu.Processor)
        assert _measured.machine("cpu") == f"cpu {torch.backends.cpu.get_cpu_capability()}"
    finally:
        _measured.machine.cache_clear()


def test_info_shows_what_was_measured(table: Write) -> None:
    table({BUCKET: {"sdpa": 123.4, "eager": 200.0}})
    report = info.collect()
    assert report["measured"] == {
        _measured.machine("cpu"): {"attention": {BUCKET: {"sdpa": 123.4, "eager": 200.0}}}
    }
    text = info.render(report)
    assert f"{_measured.machine('cpu')}, attention, {BUCKET}: sdpa 123.4 us, eager 200 us" in text
    assert "attention, flex: no dropout, no gradient of alibi_scale, on a CPU no gradient at all" in text
    assert "  nothing on this machine" not in text
    table({})
    assert "  nothing on this machine" in info.render(info.collect())


def test_writing_replaces_measured_buckets_of_one_machine(table: Write) -> None:
    path = table(text=json.dumps({
        "GPU A": {"about": {}, "ops": {"attention": {"x": {"eager": 2.0, "sdpa": 1.0}}}},
        "cpu": {"about": {}, "ops": {"attention": {"old": {"eager": 2.0, "sdpa": 1.0},
                                                   "close": {"eager": 2.0, "sdpa": 1.0}}}},
    }))  # fmt: skip
    measured = {
        ("attention", "new"): {"sdpa": 10.0, "eager": 12.34567},
        ("attention", "close"): {"sdpa": 10.0, "eager": 10.5},
        ("attention", "alone"): {"eager": 10.0},
    }
    choose.write(path, "cpu", {"torch": "2"}, measured)
    assert json.loads(path.read_text()) == {
        "GPU A": {"about": {}, "ops": {"attention": {"x": {"eager": 2.0, "sdpa": 1.0}}}},
        "cpu": {
            "about": {"torch": "2"},
            "ops": {"attention": {"new": {"eager": 12.35, "sdpa": 10.0}, "old": {"eager": 2.0, "sdpa": 1.0}}},
        },
    }
    choose.write(path, "cpu", {}, {("attention", name): {"eager": 1.0} for name in ("new", "old")})
    assert set(json.loads(path.read_text())) == {"GPU A"}


def test_cases_of_one_bucket_are_summed() -> None:
    times = [{"eager": 1.0, "sdpa": 2.0, "flex": 3.0}, {"sdpa": 5.0, "eager": 7.0}]
    assert choose.together(times) == {"eager": 8.0, "sdpa": 7.0}


def test_the_command_measures_and_auto_follows(
    table: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "CLEAR", 0.0)
    path = table({})
    smoke = ["--smoke", "--device", "cpu", "--presets", "audio_tiny", "--precision", "fp32", "--rounds", "2"]
    assert choose.main([*smoke, "--dry-run"]) == 0
    assert "    eager, sdpa" in capsys.readouterr().out
    assert choose.main([*smoke, "--table", str(path)]) == 0
    part = json.loads(path.read_text())[_measured.machine("cpu")]
    buckets = part["ops"]["attention"]
    assert {name.split()[-1] for name in buckets} == {"train", "forward"}
    assert all(set(times) >= {"eager", "sdpa"} for times in buckets.values())
    assert part["about"]["torch"] == torch.__version__ and len(part["about"]["load before"]) == 2
    for stem, case in choose.cases_of(["audio_tiny"], "smoke", [torch.float32]):
        inputs = choose.make_inputs(case, choose.Settings(device=torch.device("cpu")), 0)
        with backend_spy() as calls, record_buckets() as asked:
            case.call(inputs, None)
        times = buckets[asked[0]]
        assert calls == [(stem, min(times, key=times.get))]


def test_memory_is_measured_behind_the_gate(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    smoke = ["--smoke", "--device", "cpu", "--presets", "audio_tiny", "--precision", "fp32"]
    assert memory.main([*smoke, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["case"]: row["direction"] for row in rows} == {
        "student": "forward+backward",
        "teacher": "forward",
    }
    by_name = {(row["case"], row["variant"]): row for row in rows}
    for case in ("student", "teacher"):
        assert by_name[case, "eager"]["peak_MiB"] > 0 and by_name[case, "eager"]["ours"]
        assert by_name[case, "sdpa"]["status"] == "ok" and not by_name[case, "sdpa"]["ours"]
        assert "not installed" in by_name[case, "xformers"]["reason"]
    assert "no backward on a CPU" in by_name["student", "flex"]["reason"]
