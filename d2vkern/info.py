"""What runs here and why not the rest: ``python -m d2vkern.info [--json]``."""

import argparse
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from d2vkern import __version__, _measured, _native
from d2vkern._backend import REGISTRY, STEMS, backend_names, gaps
from d2vkern.kernels._launch import PIPELINE, pipeline_hazard


def collect() -> dict[str, Any]:
    """Versions, devices, and per op and backend the reasons why it cannot run (an empty list: it can).

    "limits": op -> backend -> what it refuses or lacks even where it runs. "measured": machine -> op ->
    bucket -> backend -> microseconds, by which auto goes on the devices here.
    """
    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return {
        "d2vkern": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "triton": _installed("triton"),
        "pipeline": pipeline(),
        "nvcc": _nvcc(),
        "native": _extension(),
        "ops": {stem: {name: gaps(stem, name) for name in backend_names(stem)} for stem in STEMS},
        "limits": {
            stem: limits
            for stem, table in REGISTRY.items()
            if (limits := {name: one.limits for name, one in table.items() if one.limits})
        },
        "measured": {
            where: times
            for where in map(_measured.machine, kinds)
            if any((times := _measured.times_of(where)).values())
        },
    }


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pipeline() -> str | None:
    """Whether Triton kernels overlap copies and matrix products on sm_90, or why not; None: no Triton."""
    version = _installed("triton")
    if version is None:
        return None
    hazard, asked = pipeline_hazard(version), os.environ.get(PIPELINE, "0") == "1"
    if not hazard:
        return "yes"
    if asked:
        return f"by {PIPELINE}=1, results may not repeat bit for bit: {hazard}"
    return f"not on sm_90: {hazard}; {PIPELINE}=1 pipelines all the same"


def _extension() -> str:
    """What the compiled extension holds and where it runs, or why it is not used."""
    if _native.problem():
        return _native.problem()
    facts = _native.about()
    if not facts.cuda:
        return "CPU kernels"
    cuda = f"CUDA {facts.cuda // 1000}.{facts.cuda % 1000 // 10} kernels ({', '.join(facts.architectures)})"
    reason = _native.cuda_problem()
    return f"CPU kernels, {cuda}" + (f", not usable: {reason}" if reason else "")


def _nvcc() -> str | None:
    """The release line of the CUDA compiler on PATH, None without one."""
    path = shutil.which("nvcc")
    if path is None:
        return None
    run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if "release" in line]
    return lines[0] if lines else f"{path} fails with status {run.returncode}"


def render(info: dict[str, Any]) -> str:
    """The report as text: versions, ops x backends, each distinct gap with its reasons, limits, times."""
    tables = ("ops", "limits", "measured")
    lines = [f"{key:<8} {_text(value)}" for key, value in info.items() if key not in tables]
    columns = list(dict.fromkeys(name for backends in info["ops"].values() for name in backends))
    lines += ["", " ".join([f"{'op':<14}", *(f"{name:<9}" for name in columns)]).rstrip()]
    why: dict[str, list[str]] = {}
    for stem, backends in info["ops"].items():
        cells = []
        for name in columns:
            reasons = backends.get(name)
            cells.append("" if reasons is None else "-" if reasons else "yes")
            if reasons:
                why.setdefault(f"{name}: {'; '.join(reasons)}", []).append(stem)
        lines.append(" ".join([f"{stem:<14}", *(f"{cell:<9}" for cell in cells)]).rstrip())
    lines += ["", "Gaps"]
    for reason, stems in why.items():
        lines.append(f"  {reason} ({'all ops' if len(stems) == len(info['ops']) else ', '.join(stems)})")
    lines += ["", "Limits"]
    for stem, limits in info["limits"].items():
        lines += [f"  {stem}, {name}: {text}" for name, text in limits.items()]
    lines += ["", "Measured: auto takes the first that can run"]
    for where, ops in info["measured"].items():
        for stem, buckets in ops.items():
            for bucket, times in buckets.items():
                ranked = ", ".join(f"{name} {times[name]:.4g} us" for name in sorted(times, key=times.get))
                lines.append(f"  {where}, {stem}, {bucket}: {ranked}")
    if not info["measured"]:
        lines.append("  nothing on this machine: auto takes the first of the default order that can run")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m d2vkern.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    info = collect()
    print(json.dumps(info, indent=2) if parser.parse_args().json else render(info))


if __name__ == "__main__":
    main()
