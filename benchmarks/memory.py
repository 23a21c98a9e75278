"""Peak memory of attention, forward and backward, against a materialised bias.

    python -m benchmarks.memory                               base presets, fp32 and bf16
    python -m benchmarks.memory --presets audio_base --device cuda --out benchmarks/results/memory_h200.json

The cases are those of benchmarks/bench_attention.py: student (with gradients) and teacher. Each variant first
passes the gate, then one call runs on fresh inputs; counted are the bytes by which tensors rise above what is
there before the call, outputs and gradients included. "pytorch" is the original's style. Load on the machine
does not change these numbers, so nothing is repeated. `make results` makes README's table from the JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_attention
from benchmarks.cases import Case, Settings, make_inputs, tensors
from benchmarks.gate import Gate
from benchmarks.harness import admit, peak_of, step_of, variants_of, with_gradients
from benchmarks.machine import provenance
from benchmarks.report import write_json
from benchmarks.run import BASE, PRECISIONS
from benchmarks.shapes import Size
from d2v.config.presets import PRESETS

RESULTS = Path(__file__).parent / "results"


def measure(case: Case, settings: Settings) -> list[dict[str, Any]]:
    """A row per variant: "peak_MiB", or why there is none."""
    gate = Gate(case, settings)
    direction = "forward+backward" if case.leaves else "forward"
    first = list(tensors(make_inputs(case, settings, 0)))[:1]
    rows = []
    for variant in variants_of("attention", case, settings, first):
        if variant.name == "compile":
            continue
        row: dict[str, Any] = {
            "case": case.name,
            "preset": case.preset,
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "direction": direction,
            "variant": variant.name,
            "ours": variant.ours,
        }
        row["status"], row["reason"] = admit(variant, gate)
        if row["status"] == "ok":
            assert variant.run is not None
            some = with_gradients(case, make_inputs(case, settings, 0), settings)
            row["peak_MiB"] = peak_of(step_of(case, variant.run, some, direction), settings.device) / (
                1 << 20
            )
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 when a variant failed its gate."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=BASE)
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=["fp32", "bf16"])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=["cpu", "cuda"])
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=Path, help="JSON (default results/memory_DEVICE.json)")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    size: Size = "smoke" if args.smoke else ("gpu" if device.type == "cuda" else "cpu")
    settings = Settings(device=device, compile=False)
    results: dict[str, Any] = {"provenance": provenance(device) | {"size": size}, "rows": []}
    for preset in args.presets:
        for name in args.precision:
            for case in bench_attention.cases(preset, size, PRECISIONS[name]):
                if "dropout" in case.name:  # the same tensors and a mask
                    continue
                for row in measure(case, settings):
                    value = f"{row['peak_MiB']:.4g} MiB" if row["status"] == "ok" else row["reason"]
                    print(f"{preset}, {row['case']}, {row['dtype']}, {row['variant']}: {value}", flush=True)
                    results["rows"].append(row)
    write_json(args.out or RESULTS / f"memory_{device.type}.json", results)
    return int(any(row["status"] == "failed" for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
