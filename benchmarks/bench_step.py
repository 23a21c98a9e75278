"""Model FLOPs per second of whole training steps, over the same machine's matmul rate in the same run.

    python -m benchmarks.bench_step [--presets image_base audio_base text_base] [--precision fp32 bf16]
        [--steps 3]

A step is everything a run does between two batches: masks, forward with teacher, backward, gradient norm and
clip, optimizer, EMA. Each case runs in a process of its own, so that its peak memory is its own; the matmul
rate (2048x768x3072, fp32, at most two threads) is measured in that process before and after the steps. Prints
a table and writes JSON with provenance.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

MATMUL = (2048, 768, 3072)
# Sizes: one image; two utterances of 5 s; two blocks of 256 tokens. GFLOP: model FLOPs as counted for the
# original, the numerator on both sides. The original's seconds, share of its machine's matmul rate and
# peak MiB on an idle two-core machine with 204 GFLOP/s fp32 (fp32, two threads).
CASES: dict[str, dict[str, Any]] = {
    "image_base": {"batch": 1, "GFLOP": 411, "original": {"seconds": 3.41, "share": 0.59, "MiB": 3107}},
    "audio_base": {
        "batch": 2,
        "GFLOP": 1354,
        "samples": 80_000,
        "original": {"seconds": 13.05, "share": 0.51, "MiB": 5416},
    },
    "text_base": {
        "batch": 2,
        "GFLOP": 1884,
        "tokens": 256,
        "original": {"seconds": 16.55, "share": 0.56, "MiB": 6273},
    },
}


def matmul_rate(dtype: Any, repeats: int = 10) -> float:
    """FLOP/s of one matrix product, median."""
    import torch

    m, k, n = MATMUL
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * m * k * n / statistics.median(times[2:])


def measure(preset: str, precision: str, steps: int, threads: int) -> dict[str, Any]:
    """One case in this process."""
    import torch

    from d2v.cpu import tune_allocator
    from d2v.model import Data2Vec
    from d2v.optim import build_optimizer, clip_factor, learning_rate, set_learning_rate, teacher_decay
    from d2v.presets import preset as load_preset

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    tune_allocator()
    case, cfg = CASES[preset], load_preset(preset)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rates = {name: [matmul_rate(dtype)] for name, dtype in dtypes.items()}
    model = Data2Vec(cfg.model).train()
    model.compute_dtype = dtypes[precision]
    optimizer = build_optimizer(model, cfg)
    params = [p for p in model.parameters() if p.requires_grad]
    batch = case["batch"]
    if preset.startswith("image"):
        source = torch.randn(batch, 3, 224, 224)
    elif preset.startswith("audio"):
        source = torch.randn(batch, case["samples"])
    else:
        source = torch.randint(4, 50_000, (batch, case["tokens"]))
    ids = torch.arange(batch)
    times, losses = [], []
    for step in range(steps + 1):
        start = time.perf_counter()
        plan = model.sample_masks(source, ids, epoch=step, seed=1)
        out = model(source, mask=plan)
        out.loss.backward()
        _, factor = clip_factor(params, cfg.optim.clip)
        set_learning_rate(optimizer, learning_rate(cfg.optim, step, cfg.train.steps))
        optimizer.step(clip_factor=factor, ema_decay=teacher_decay(cfg.ema, step + 1))
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(out.loss.detach()))
        del out
        times.append(time.perf_counter() - start)
    for name, dtype in dtypes.items():
        rates[name].append(matmul_rate(dtype))
    seconds = statistics.median(times[1:])
    flops = case["GFLOP"] * 1e9
    rate = {name: statistics.mean(values) for name, values in rates.items()}
    return {
        "preset": preset,
        "precision": precision,
        "GFLOP": flops / 1e9,
        "seconds": seconds,
        "all_seconds": times,
        "GFLOP/s": flops / seconds / 1e9,
        "share_of_fp32_matmul": flops / seconds / rate["fp32"],
        "share_of_own_matmul": flops / seconds / rate[precision],
        "matmul_GFLOP/s": {name: [v / 1e9 for v in values] for name, values in rates.items()},
        "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": losses,
        "original": case["original"],
    }


def provenance() -> dict[str, Any]:
    """Where the numbers come from."""
    import torch

    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {"torch": torch.__version__, "cpu": model, "capability": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(), "commit": commit,
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write JSON here")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = []
    print(
        "| preset | precision | GFLOP | s/step | GFLOP/s | of fp32 matmul | of own matmul | original "
        "| peak MiB | original |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for preset in args.presets:
        for precision in args.precision:
            with ProcessPoolExecutor(1, mp_context=context) as pool:  # a process of its own for each case
                r = pool.submit(measure, preset, precision, args.steps, args.threads).result()
            results.append(r)
            original = r["original"]
            print(
                f"| {preset} | {precision} | {r['GFLOP']:.0f} | {r['seconds']:.2f} | {r['GFLOP/s']:.0f} "
                f"| {r['share_of_fp32_matmul']:.2f} | {r['share_of_own_matmul']:.2f} "
                f"| {original['share']:.2f} | {r['peak_MiB']:.0f} | {original['MiB']} |",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps({"provenance": provenance(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
