"""Capturing steps for Nsight Systems, the commands of benchmarks/nsys.sh, and the table made of its reports.

The reports are written by hand after those of `nsys stats --format csv`: the columns of the report scripts
that came with Nsight Systems in 2024, unchanged in a range trace recorded by 2026.3; times in ns, names
with commas quoted, the queue columns empty where a kernel started before its launch call returned.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import d2v.train.pretrain
from d2v.cli.main import main as command
from d2v.config.toml import read_config
from d2v.tools.nsys import hot_path, main, read_reports, summarise, table
from d2v.train.capture import Capture, parse_steps
from d2v.train.pretrain import run
from d2vkern._nvtx import ranges_are_on
from tests.d2v.tiny_runs import make_data, tiny

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda")
RANGES = """\
Start (ns),End (ns),Duration (ns),DurChild (ns),DurNonChild (ns),Name,PID,TID,Lvl,NumChild,RangeId,ParentId,RangeStack,NameTree
1000,9000,8000,2000,6000,d2v:student/block00,50,50,0,1,1,,:1,d2v:student/block00
2000,4000,2000,0,2000,d2vkern:attention/fwd/triton,50,50,1,0,2,1,:1:2,--d2vkern:attention/fwd/triton
9000,9500,500,0,500,d2v:student/block11,50,50,0,0,3,,:3,d2v:student/block11
20000,40000,20000,0,20000,d2v:backward,50,50,0,0,4,,:4,d2v:backward
24000,26000,2000,0,2000,NCCL:ncclAllReduce,50,51,0,0,5,,:5,NCCL:ncclAllReduce
30000,32000,2000,0,2000,d2vkern:attention/bwd/triton,50,51,0,0,6,,:6,d2vkern:attention/bwd/triton
20000,90000,70000,0,70000,d2v:data,77,77,0,0,7,,:7,d2v:data
500,60000,59500,30500,29000,d2v:step,50,50,0,3,8,,:8,d2v:step
"""  # noqa: E501
KERNELS = """\
API Start (ns),API Dur (ns),Queue Start (ns),Queue Dur (ns),Kernel Start (ns),Kernel Dur (ns),Total Dur (ns),PID,TID,DevId,API Function,GridXYZ,BlockXYZ,Kernel Name
2500,100,2600,400,3000,2000,2500,50,50,0,cuLaunchKernelEx, 148    1    1, 256    1    1,attention_fwd_kernel
5000,100,,,5050,1000,1050,50,50,0,cudaLaunchKernel,   8    1    1, 256    1    1,"void gemm<float, 128>(float *)"
9100,100,9200,800,10000,3000,3900,50,50,0,cudaLaunchKernel,   8    1    1, 256    1    1,"void gemm<float, 128>(float *)"
25000,100,25100,900,26000,4000,5000,50,51,0,cudaLaunchKernel,   8    1    1, 256    1    1,elementwise
31000,100,31100,900,32000,9000,10000,50,51,0,cuLaunchKernelEx, 148    1    1, 256    1    1,attention_bwd_kernel
50000,100,50100,900,51000,1000,2000,50,50,0,cudaLaunchKernel,   8    1    1, 256    1    1,"stray<int, 2>"
"""  # noqa: E501
KERNEL_SUM = """\
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
45.0,9000,1,9000.0,9000.0,9000,9000,0.0,attention_bwd_kernel
20.0,4000,2,2000.0,2000.0,1000,3000,1414.2,"void gemm<float, 128>(float *)"
20.0,4000,1,4000.0,4000.0,4000,4000,0.0,elementwise
10.0,2000,1,2000.0,2000.0,2000,2000,0.0,attention_fwd_kernel
5.0,1000,1,1000.0,1000.0,1000,1000,0.0,"stray<int, 2>"
"""


def write(folder, ranges=RANGES, kernels=KERNELS, total=KERNEL_SUM):
    """The three files, as nsys names them."""
    texts = {"nvtx_pushpop_trace": ranges, "cuda_kern_exec_trace": kernels, "cuda_gpu_kern_sum": total}
    paths = []
    for name, text in texts.items():
        paths.append(str(folder / f"steps_{name}.csv"))
        Path(paths[-1]).write_text(text)
    return paths


def test_each_kernel_belongs_to_an_op_or_phase_of_its_thread_else_to_a_phase_of_its_process(tmp_path):
    summary = summarise(read_reports(write(tmp_path)))
    found = {path: (row.calls, row.launches, row.time, row.idle) for path, row in summary.rows.items()}
    assert found == {
        "attention/fwd/triton": (1, 1, 2000, 0),
        "student": (2, 2, 4000, 50 + 3950),
        "backward": (1, 1, 4000, 13_000),
        "attention/bwd/triton": (1, 1, 9000, 2000),
        "data": (1, 0, 0, 0),  # another process: none of this one's kernels
    }
    assert (summary.outside, summary.outside_idle) == ({"stray<int, 2>": 1000}, 10_000)
    assert (summary.kernel_time, summary.wall) == (20_000, 49_000)
    assert summary.coverage == pytest.approx(19 / 20)


def test_nested_and_closed_ranges_do_not_leak(tmp_path):
    def line(start, end, name):
        return f"{start},{end},,,,{name},1,1,,,,,,\n"

    def kernel(called):
        return f"{called},1,,,{called},1,1,1,1,0,launch,,,k{called}\n"

    header, kernels = RANGES.splitlines()[0] + "\n", KERNELS.splitlines()[0] + "\n"
    ranges = header + line(10, 99, "d2v:a") + line(10, 50, "d2v:b/1") + line(20, 30, "d2v:c")
    ranges += line(21, 29, "d2vkern:x/fwd/eager") + line(22, 28, "d2vkern:y/fwd/eager")
    ranges += line(22, 28, "d2v:d") + line(60, 70, "d2v:c") + line(70, 80, "d2v:b")
    kernels += "".join(kernel(t) for t in (98, 5, 10, 25, 29, 30, 51, 60, 75, 85, 100))  # in any order
    summary = summarise(read_reports(write(tmp_path, ranges, kernels, KERNEL_SUM.splitlines()[0])))
    assert {path: row.launches for path, row in summary.rows.items()} == {
        "a": 3,  # at 51, 85, 98
        "b": 3,  # at 10, 30, 75
        "c": 2,  # at 29, 60
        "d": 0,
        "x/fwd/eager": 1,  # at 25: the outermost op, whatever is inside
        "y/fwd/eager": 0,
    }
    assert set(summary.outside) == {"k5", "k100"}


def test_kernels_that_overlap_leave_no_negative_gap(tmp_path):
    lines = KERNELS.splitlines()[:1] + [
        "1000,1,,,1000,9000,1,50,50,0,launch,,,long",
        "1100,1,,,2000,1000,1,50,50,0,launch,,,inside",
        "1200,1,,,12000,1000,1,50,50,0,launch,,,late",
        "1300,1,,,99000,1000,1,50,50,1,launch,,,other device",
    ]
    summary = summarise(read_reports(write(tmp_path, kernels="\n".join(lines))))
    assert sum(row.idle for row in summary.rows.values()) + summary.outside_idle == 2000


def test_kernels_without_a_recorded_launch_count_as_outside(tmp_path):
    total = KERNEL_SUM + "9.0,5000,3,1.0,1.0,1,1,0.0,lost\n"
    summary = summarise(read_reports(write(tmp_path, total=total)))
    assert summary.outside["(launch not recorded)"] == 5000
    assert summary.coverage == pytest.approx(19 / 25)


def test_below_98_percent_is_exit_code_1_and_names_the_kernel(tmp_path, capsys):
    assert main([*write(tmp_path), "--steps", "2"]) == 1
    out = capsys.readouterr().out
    assert "95.00% of that inside named ranges, at least 98% wanted" in out
    assert "outside:  5.00% stray<int, 2>" in out
    assert [line.split() for line in out.splitlines() if line.startswith("student")] == [
        ["student", "0.002", "20.0%", "1", "1", "2.00", "0.002"]
    ]
    assert out.splitlines()[1].startswith("attention/bwd/triton")  # by time


def test_enough_coverage_is_exit_code_0(tmp_path):
    without = [text.replace(text.splitlines()[-1] + "\n", "") for text in (KERNELS, KERNEL_SUM)]
    assert main(write(tmp_path, RANGES, *without)) == 0


def test_what_nsys_prints_before_the_header_is_skipped(tmp_path):
    spoken = "Processing [steps.sqlite] with [cuda_gpu_kern_sum.py]...\n\n"
    assert len(read_reports(write(tmp_path, total=spoken + KERNEL_SUM))["cuda_gpu_kern_sum"]) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranges": RANGES.replace("(ns)", "(us)")}, "must be one of nvtx_pushpop_trace"),
        ({"ranges": RANGES.replace("d2v", "other")}, "no range of the domains d2v, d2vkern"),
        ({"kernels": KERNELS.splitlines()[0]}, "cuda_kern_exec_trace has no kernel"),
        ({"total": ""}, "must be one of"),
    ],
)
def test_unusable_reports_are_one_line_and_exit_code_2(change, message, tmp_path, capsys):
    assert main(write(tmp_path, **change)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and message in err


def test_a_missing_report_is_named(tmp_path, capsys):
    assert main(write(tmp_path)[:2]) == 2
    assert "report cuda_gpu_kern_sum is missing" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere.csv")]) == 2


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("d2v:student/block07", "student"),
        ("d2v:backward", "backward"),
        ("d2v:step", None),
        ("d2vkern:conv_block_1d/fwd/eager", "conv_block_1d/fwd/eager"),
        ("cuBLAS:cublasGemmEx", None),
        (":data", None),
    ],
)
def test_hot_paths(name, path):
    assert hot_path(name) == path


def test_table_of_no_kernel_time_does_not_divide_by_zero(tmp_path):
    kernels = KERNELS.splitlines()[0] + "\n1,1,,,1,0,1,50,50,0,launch,,,empty\n"
    total = KERNEL_SUM.splitlines()[0]
    assert "0.00%" in table(summarise(read_reports(write(tmp_path, RANGES, kernels, total))), 1)[-2]


@pytest.mark.parametrize("text", ["20:10", "5:5", "5", "a:b", "-1:3", "1:2:3", ""])
def test_steps_that_are_no_window(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be START:STOP"):
        parse_steps(text)
    arguments = ["train", "image_tiny", "--data", "digits", "--out", "r", "--profile", "nsys"]
    assert command([*arguments, f"--profile-steps={text}"]) == 2
    assert "--profile-steps must be START:STOP" in capsys.readouterr().err


def test_without_a_gpu_profiling_is_refused_before_anything_is_made(tmp_path, capsys):
    out = tmp_path / "r"
    code = command(["train", "image_tiny", "--data", "digits", "--out", str(out), "--train.device", "cpu",
                    "--profile", "nsys", "--profile-steps", "1:2"])  # fmt: skip
    assert code == 2
    assert "train: --profile nsys needs a CUDA device, this run is on cpu" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture
def profiler_calls(monkeypatch):
    """What a Capture on a GPU would say to CUDA."""
    import torch.cuda.profiler

    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    return calls


def test_capture_waits_for_the_device_and_switches_at_its_steps(profiler_calls):
    before = ranges_are_on()
    with Capture((2, 4), CUDA) as capture:
        assert ranges_are_on()
        for done in range(7):
            capture.reach(done)
            profiler_calls.append(done)
    assert profiler_calls == [0, 1, "wait", "start", 2, 3, "wait", "stop", 4, 5, 6]
    assert ranges_are_on() == before


def test_a_capture_ends_with_the_run(profiler_calls):
    with pytest.raises(KeyboardInterrupt), Capture((0, 4), CUDA) as capture:
        capture.reach(0)
        raise KeyboardInterrupt
    assert profiler_calls == ["wait", "start", "wait", "stop"]


def test_without_a_window_nothing_is_called(profiler_calls):
    with Capture(None, torch.device("cpu")) as capture:
        assert capture.check(0, 10) is None
        assert not ranges_are_on()
        for done in range(3):
            capture.reach(done)
    assert profiler_calls == []


def test_capture_says_when_nobody_listens(monkeypatch):
    for name in ("NSYS_PROFILING_SESSION_ID", "CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH"):
        monkeypatch.delenv(name, raising=False)
    capture = Capture((10, 20), CUDA)
    assert "benchmarks/nsys.sh" in capture.check(0, 20)
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    assert capture.check(0, 20) is None


@pytest.mark.parametrize(("done", "total"), [(0, 19), (11, 30)])
def test_a_window_outside_of_the_run_is_refused(done, total):
    with pytest.raises(ValueError, match=f"must lie within this run's steps {done}:{total}, got 10:20"):
        Capture((10, 20), CUDA).check(done, total)


def test_a_run_captures_its_steps_and_keeps_no_trace_of_it(tmp_path, monkeypatch, profiler_calls, capsys):
    monkeypatch.delenv("NSYS_PROFILING_SESSION_ID", raising=False)
    cfg, data = tiny("image", steps=5), make_data("image", tmp_path / "data")
    plain = run(cfg, data, tmp_path / "plain")
    trained = d2v.train.pretrain.Trainer.step

    def step(self, number, batches):
        profiler_calls.append(number)
        return trained(self, number, batches)

    monkeypatch.setattr(d2v.train.pretrain.Trainer, "step", step)
    monkeypatch.setattr(d2v.train.pretrain, "Capture", lambda steps, device: Capture(steps, CUDA))
    captured = run(cfg, data, tmp_path / "captured", capture=(1, 3))
    assert profiler_calls == [1, "wait", "start", 2, 3, "wait", "stop", 4, 5]
    assert "nothing is recorded" in capsys.readouterr().out
    for key in ("step", "loss", "grad_norm"):
        assert [row[key] for row in captured.metrics] == [row[key] for row in plain.metrics]
    assert read_config(tmp_path / "captured")[0] == cfg
    with pytest.raises(ValueError, match="must lie within"):
        run(cfg, data, tmp_path / "late", capture=(1, 6))
    assert not (tmp_path / "late").exists()


def shell(*arguments, **environment):
    script = [str(ROOT / "benchmarks" / "nsys.sh"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, check=False, cwd=ROOT,
                          env={**os.environ, **environment})  # fmt: skip


def test_dry_run_prints_commands_that_fit_together():
    done = shell("--dry-run", "--steps", "3:08", "--out", "a b", "text_base", "--data", "some text",
                 "--data.batch", "4", PYTHON="/opt/python")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    profile, stats, report = map(shlex.split, done.stdout.splitlines())
    at = profile.index("/opt/python")
    assert profile[:2] == ["nsys", "profile"]
    assert {
        "--trace=cuda,nvtx,cublas,cudnn", "--capture-range=cudaProfilerApi", "--capture-range-end=stop",
        "--cuda-graph-trace=node", "--output=a b/steps",
    } <= set(profile[:at])  # fmt: skip
    assert profile[at:] == [
        "/opt/python", "-m", "d2v", "train", "text_base", "--out", "a b/run", "--train.steps", "08",
        "--profile", "nsys", "--profile-steps", "3:08", "--data", "some text", "--data.batch", "4",
    ]  # fmt: skip
    assert stats[:2] == ["nsys", "stats"] and stats[-1] == "a b/steps.nsys-rep"
    reported = [word.removeprefix("--report=") for word in stats if word.startswith("--report=")]
    assert report[:5] == ["/opt/python", "-m", "d2v.tools.nsys", "--steps", "5"]
    assert report[5:] == [f"a b/steps_{name}.csv" for name in reported[:3]]
    assert not (ROOT / "a b").exists()


def test_the_printed_train_command_is_understood(monkeypatch):
    seen = {}

    def fake_run(cfg, data, out, *, resume, capture, probe):
        seen.update(data=data, out=out, steps=cfg.train.steps, capture=capture)
        return d2v.train.pretrain.RunResult(out, 0, False, 0, 0.0, [])

    monkeypatch.setattr(d2v.train.pretrain, "run", fake_run)
    words = shlex.split(shell("--dry-run", "image_tiny", "--data", "digits").stdout.splitlines()[0])
    assert command(words[words.index("d2v") + 1 :]) == 0
    assert seen == {"data": "digits", "out": "runs/nsys-image_tiny/run", "steps": 20, "capture": (10, 20)}


def test_the_printed_report_command_works(tmp_path):
    done = shell("--dry-run", "--steps", "0:2", "--out", str(tmp_path), "image_tiny", PYTHON=sys.executable)
    write(tmp_path)
    report = subprocess.run(shlex.split(done.stdout.splitlines()[-1]), capture_output=True, text=True,
                            check=False, cwd=ROOT)  # fmt: skip
    assert (report.returncode, report.stderr) == (1, "")
    assert "95.00% of that inside named ranges" in report.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nsys.sh [--dry-run]"),
        (["--dry-run"], "nsys.sh [--dry-run]"),
        (["--fast", "image_base"], "nsys.sh [--dry-run]"),
        (["--steps", "9:9", "image_base"], "START < STOP, got 9:9"),
        (["--steps", "all", "image_base"], "START < STOP, got all"),
    ],
)
def test_script_refuses_what_it_cannot_do(arguments, message):
    done = shell(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_script_says_that_nsys_is_missing(tmp_path):
    for tool in ("bash", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = shell("--out", str(tmp_path / "out"), "image_base", PATH=str(tmp_path))
    assert done.returncode == 2
    assert "nsys is not on PATH" in done.stderr
    assert not (tmp_path / "out").exists()
