"""benchmarks/gpu.sh: what it runs, in which order and within which limits, and what it makes of failures.

A script stands in for the interpreter, notes its arguments and fails, hangs or writes results as told; one
test runs the real thing at toy sizes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.results_table import main as results_table

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PARTS = ["build", "tests", "ops", "step", "profile", "scaling"]
STAND_IN = r"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
out=
for ((i = 1; i < $#; i++)); do
  next=$((i + 1))
  [[ ${!i} != --out ]] || out=${!next}
done
case $out in
  *.json) echo '{}' >"$out" ;;
  ?*) mkdir -p "$out" && echo '{}' >"$out/profile.json" ;;
esac
if [[ -n $HANGS && $* =~ $HANGS ]]; then
  sleep 300 &
  echo $! >>"$CALLS.pids"
  wait
fi
if [[ -n $FAILS && $* =~ $FAILS ]]; then
  echo "something broke"
  exit 3
fi
"""


class Machine:
    """A place to run the script in, with a stand-in for Python and one for nvidia-smi."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.results = folder, folder / "out", folder / "out" / "results"
        self.calls_file = folder / "calls"
        self.environment = {**os.environ, "CALLS": str(self.calls_file), "FAILS": "", "HANGS": ""}
        self.environment["PYTHON"] = str(self._executable("python", STAND_IN))
        self._executable("nvidia-smi", "#!/bin/sh\nexit 1\n")
        self.environment["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"

    def _executable(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def add_gpu(self) -> None:
        self._executable("nvidia-smi", "#!/bin/sh\necho 9.0\n")

    def command(self, *arguments: str) -> list[str]:
        return [str(SCRIPT), "--out", str(self.out), *arguments]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def calls(self) -> list[str]:
        """What the stand-in was called with since the last look."""
        if not self.calls_file.exists():
            return []
        lines = self.calls_file.read_text().splitlines()
        self.calls_file.unlink()
        return lines

    def hanging(self) -> list[str]:
        """Processes that the stand-in left, once the signalled ones have had time to go."""
        pids = Path(f"{self.calls_file}.pids").read_text().split()
        until = time.monotonic() + 5
        while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
            time.sleep(0.05)
        return left


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Part -> what became of it, from the table at the end."""
    lines = done.stdout.rpartition("\n\n")[2].splitlines()
    rows = [line.split(maxsplit=3) for line in lines if line.split()[0] in PARTS]
    return {part: result for part, _, _, result in rows}


def modules(calls: list[str]) -> list[str]:
    return [call.split()[1] for call in calls]


def test_parts_run_in_order_and_not_again(machine):
    done = machine.run("--dry-run", "--presets", "image_tiny,text_tiny", "--ops", "mlp,masks",
                       "--variants", "eager", "--tests", "tests/test_mlp.py")  # fmt: skip
    assert (done.returncode, summary(done)) == (0, dict.fromkeys(PARTS, "done")), done.stdout + done.stderr
    out = machine.out
    assert machine.calls() == [
        "-m d2vkern.info",
        "-m pytest -q -m gpu tests/test_mlp.py",
        "-m benchmarks.run --device cpu --precision bf16 --no-compile --rounds 5 --presets image_tiny "
        f"text_tiny --smoke --ops mlp masks --resume --out {out}/ops/json/ops_cpu.json",
        "-m benchmarks.bench_step --device cpu --precision bf16 --presets image_tiny text_tiny --smoke "
        f"--variants eager --resume --out {out}/step/json/step_cpu.json",
        *(f"-m d2v profile {preset} --out {out}/profile/{preset} --steps 3 --batch 1 --precision bf16 "
          "--train.device cpu --data.max-seconds 15.6" for preset in ("image_tiny", "text_tiny")),
        "-m benchmarks.scaling --device cpu --axes masks tokens --rounds 3 --presets image_tiny text_tiny "
        f"--smoke --out {out}/scaling/json/scaling_cpu.json",
    ]  # fmt: skip
    assert {path.name for path in machine.results.iterdir()} == {
        "ops_cpu.json", "step_cpu.json", "profile_cpu_image_tiny.json", "profile_cpu_text_tiny.json",
        "scaling_cpu.json"}  # fmt: skip
    done = machine.run("--dry-run")
    assert (done.returncode, summary(done)) == (0, dict.fromkeys(PARTS, "done before"))
    assert machine.calls() == []
    done = machine.run("--dry-run", "--again", "step", "--again", "build")
    assert modules(machine.calls()) == ["d2vkern.info", "benchmarks.bench_step"]
    assert summary(done)["step"] == "done" and summary(done)["ops"] == "done before"


def test_a_gpu_gets_base_presets_and_an_installation_where_there_is_none(machine):
    machine.add_gpu()
    done = machine.run("--results", str(machine.results), FAILS="import d2v")
    assert done.returncode == 0, done.stdout
    calls = machine.calls()
    installing = calls.index("-m pip install --no-build-isolation -e .[train,dev]")
    assert calls[0].startswith("-c import d2v, d2vkern") and calls[installing + 1] == "-m d2vkern.info"
    base = "--presets image_base audio_base text_base"
    warming = [call for call in calls if "benchmarks.aot" in call]
    assert len(warming) == 1 and "--compiles --dtypes bf16 --targets sm_90 " in warming[0]
    assert warming[0].endswith(base)
    for call in calls[-7:]:
        assert "--smoke" not in call and ("cuda" in call or "pytest" in call)
        assert base in call or " d2v profile " in call or "pytest" in call
    several, alone = (call for call in calls if call.startswith("-m pytest"))
    assert several.startswith("-m pytest -q -m gpu -n ") and "-k not (offsets or" in several
    assert alone == "-m pytest -q -m gpu -k offsets or elements or ten_thousand"
    assert [call.split("--batch ")[1][:2] for call in calls if " d2v profile " in call] == ["64", "16", "16"]
    assert (machine.results / "step_cuda.json").exists()
    machine.run("--results", str(machine.results), "--again", "build")
    assert not any("pip" in call for call in machine.calls())


def test_without_a_gpu_it_is_a_dry_run(machine):
    done = machine.run("--parts", "build")
    assert done.returncode == 0 and "no NVIDIA driver, so this is a dry run on the CPU" in done.stdout
    assert machine.calls() == ["-m d2vkern.info"]


def test_a_failing_part_is_reported_and_stops_no_other(machine):
    done = machine.run("--dry-run", FAILS="-m pytest")
    assert done.returncode == 1
    assert summary(done) == dict.fromkeys(PARTS, "done") | {"tests": "FAILED with exit code 3"}
    assert "  | something broke" in done.stdout and "call it again to continue" in done.stdout
    machine.calls()
    done = machine.run("--dry-run")
    assert done.returncode == 0 and modules(machine.calls()) == ["pytest"]
    assert summary(done)["tests"] == "done"


def test_a_profile_that_is_there_is_not_made_again(machine):
    machine.run("--dry-run", "--parts", "profile", FAILS="audio_tiny")
    assert [call.split()[3] for call in machine.calls()] == ["image_tiny", "audio_tiny"]
    done = machine.run("--dry-run", "--parts", "profile")
    assert [call.split()[3] for call in machine.calls()] == ["audio_tiny", "text_tiny"]
    assert done.returncode == 0 and len(list(machine.results.iterdir())) == 3


def test_limits_stop_parts_with_all_their_processes_and_keep_their_results(machine):
    began = time.monotonic()
    done = machine.run("--dry-run", "--limit", "10", "--parts", "ops,step,scaling", HANGS=r"benchmarks\.")
    assert done.returncode == 1 and 8 < time.monotonic() - began < 20
    found = summary(done)
    assert found["ops"] == "stopped at its limit of 3 s" and found["step"] == "stopped at its limit of 5 s"
    assert found["scaling"] in ("stopped at its limit of 2 s", "stopped at its limit of 1 s")  # what was left
    assert machine.hanging() == []
    assert (machine.results / "ops_cpu.json").exists()
    done = machine.run("--dry-run", "--limit", "1")
    assert done.returncode == 1
    assert set(summary(done).values()) == {"not reached: no time left"}


def test_stopping_the_script_stops_its_part(machine):
    process = subprocess.Popen(
        machine.command("--dry-run", "--parts", "step"),
        env=machine.environment | {"HANGS": "bench_step"},
        stdout=subprocess.DEVNULL,
    )
    pids = Path(f"{machine.calls_file}.pids")
    until = time.monotonic() + 30
    while not (pids.exists() and pids.read_text().endswith("\n")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    assert machine.hanging() == [] and not (machine.out / "step" / "done").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fast"], "benchmarks/gpu.sh [--dry-run]"),
        (["--limit"], "--limit needs a value"),
        (["--limit", "5m"], "--limit must be whole seconds, got 5m"),
        (["--parts", "ops,speed"], "no part 'speed'; parts: build, tests, ops"),
        (["--again", ""], "no part ''; parts: build"),
    ],
)
def test_arguments_that_cannot_be(machine, arguments, message):
    done = machine.run(*arguments)
    assert done.returncode == 2 and message in done.stderr
    assert not machine.out.exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="without 16-bit products of the processor's own (AVX-512) it takes many minutes",
)
def test_dry_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("PYTHON", sys.executable)
    arguments = ["--dry-run", "--limit", "3600", "--out", str(tmp_path), "--presets", "text_tiny",
                 "--ops", "mlp", "--variants", "eager", "--tests", "tests/test_benchmarks.py"]  # fmt: skip
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, summary(done)) == (0, dict.fromkeys(PARTS, "done")), done.stdout
    assert "no CUDA device" in (tmp_path / "build" / "log").read_text()
    step = json.loads((tmp_path / "results" / "step_cpu.json").read_text())
    assert step["complete"] and [row["status"] for row in step["results"]] == ["ok"]
    readme = tmp_path / "README.md"
    names = ("step", "ops", "profile", "scaling", "hotpaths")
    readme.write_text("".join(f"<!-- results:{name} -->\n<!-- /results:{name} -->\n" for name in names))
    assert results_table(["--pages", str(readme), "--results", str(tmp_path / "results")]) == 0
    text = readme.read_text()
    for line in (
        "| text_tiny | bf16 |",
        "| gelu_mlp, student | text_tiny |",
        "**text_tiny**, bf16, auto",
        "| text_tiny | masks 1 to 2 |",
        "| hot path of the eager step | text_tiny bf16 |",
    ):
        assert line in text
