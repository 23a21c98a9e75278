"""Reads samples for `benchmarks.bench_data` in a process of its own, with whichever version of the project is
first on PYTHONPATH: a request a line on stdin, its answer a line on stdout, both JSON.

    {"open": FOLDER, "preset": NAME, "tokenizer": FILE or null}  ->  {"samples": how many}
    {"seconds": S, "epoch": E}    ->  {"done": samples read, "taken": seconds of the process}
    {"tokenise": FOLDER, "preset": NAME, "tokenizer": FILE}      ->  {"taken": seconds of the process}

Stands on names alone that every version has: `d2v.preset`, `open_data`, and the loader's source.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import tempfile
import time
from typing import Any

import torch

import d2v


def opened(folder: str, preset: str, tokenizer: str | None) -> Any:
    """The source of a data set as a preset reads it."""
    doors = importlib.import_module("d2v.data")
    if not hasattr(doors, "open_data"):
        doors = importlib.import_module("d2v.data.open")
    cfg = d2v.preset(preset)
    data = dataclasses.replace(cfg.data, batch=30, tokenizer=tokenizer)
    return doors.open_data(folder, dataclasses.replace(cfg, data=data)).source


def tokenised(folder: str, preset: str, tokenizer: str) -> float:
    """Seconds of the process to open texts whose blocks are in no cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["D2V_CACHE"] = cache
        began = time.process_time()
        opened(folder, preset, tokenizer)
        return time.process_time() - began


def read(source: Any, seconds: float, epoch: int) -> dict[str, float]:
    """Samples in turn for some seconds of the process, at least one."""
    began, done, taken = time.process_time(), 0, 0.0
    while taken < seconds or not done:
        source.read(done % len(source), epoch)
        done += 1
        taken = time.process_time() - began
    return {"done": done, "taken": taken}


def main() -> None:
    torch.set_num_threads(1)
    source: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if "open" in request:
            source = opened(request["open"], request["preset"], request["tokenizer"])
            answer: dict[str, float] = {"samples": len(source)}
        elif "tokenise" in request:
            taken = tokenised(request["tokenise"], request["preset"], request["tokenizer"])
            answer = {"taken": taken}
        else:
            answer = read(source, request["seconds"], request["epoch"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
