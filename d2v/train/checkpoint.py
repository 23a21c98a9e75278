"""A run's files: checkpoints that survive a crash at any instant, and its config.

`checkpoints/step_N/` holds `model.safetensors` (student under the original's names, teacher under
`_ema.`), `optimizer.safetensors`, `rng.safetensors` and `state.json` (trainer state plus the SHA-256
of every file and of itself). It is written into a hidden folder beside it, flushed to disk, then
renamed, so a folder called `step_N` is complete; older ones are deleted only after that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..config.atomic import sync
from ..config.toml import SETTINGS, CheckpointError, is_tuned, read_settings

LABELS = "labels.json"
"""file of a run with its class names, or letters"""
FORMAT = 1
STATE = "state.json"
BEST = "best"
"""folder of a fine-tuning run with the checkpoint that scored best on the first held-out part"""
_TENSOR_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` returns; every tensor is on the CPU."""

    path: Path
    step: int
    model: dict[str, Tensor]
    """`model.state_dict()`"""
    optimizer: dict[str, dict[str, Tensor]]
    """parameter name -> {"step", "exp_avg", "exp_avg_sq"}"""
    trainer: dict[str, Any]
    rng: dict[str, Tensor]


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    model: nn.Module,
    optimizer_state: Mapping[str, Mapping[str, Tensor]],
    trainer_state: Mapping[str, Any],
    rng: Mapping[str, Tensor],
    keep: int,
) -> Path:
    """Write `checkpoints/step_<step>` atomically, then delete all but the `keep` newest up to it.

    optimizer_state: parameter name -> field -> tensor. trainer_state: JSON-able.
    Anything that stops the writing (a full disk, a lost mount) raises `CheckpointError` with the
    reason, removes what was half written and leaves every earlier checkpoint as it was.
    """
    if keep < 1:
        raise ValueError(f"save_checkpoint: keep must be positive, got {keep}")
    folder = Path(run_dir) / "checkpoints"
    target, temporary = folder / f"step_{step}", folder / f".tmp-step_{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)
        _tidy(folder)
        temporary.mkdir()
        flat = {
            f"{name}.{field}": t for name, fields in optimizer_state.items() for field, t in fields.items()
        }
        for name, tensors in zip(_TENSOR_FILES, (model.state_dict(), flat, rng), strict=True):
            _write_tensors(temporary / name, tensors)
        files = {name: _fingerprint(temporary / name) for name in _TENSOR_FILES}
        state = {"format": FORMAT, "step": step, "files": files, "trainer": dict(trainer_state)}
        state = json.loads(json.dumps(state))  # as it will be read: its digest must not see tuples
        (temporary / STATE).write_text(json.dumps({**state, "sha256": _digest(state)}, indent=1))
        for name in (*_TENSOR_FILES, STATE):
            sync(temporary / name)
        sync(temporary)
        _replace(temporary, target)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):  # the next save tidies again
            _tidy(folder)
        previous = latest_checkpoint(run_dir)
        rest = f"; the newest complete checkpoint is {previous}" if previous else ""
        raise CheckpointError(f"{target}: saving failed: {error}{rest}") from error
    older = _older(folder, step)
    for path in older[: max(0, len(older) - (keep - 1))]:
        _remove(path)
    return target


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file; of tensors that share memory each is written in full."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().to("cpu").contiguous()
        start = flat.untyped_storage().data_ptr()
        out[name] = flat.clone() if start in seen else flat
        seen.add(start)
    safetensors.torch.save_file(out, path)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _replace(temporary: Path, target: Path) -> None:
    """Rename into place; a checkpoint of the same step steps aside first and is then deleted."""
    aside = target.with_name(f".old-{target.name}")
    if target.exists():
        target.rename(aside)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint such that a half-deleted one is never found under its name."""
    hidden = path.with_name(f".tmp-{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _tidy(folder: Path) -> None:
    """Clear what a crash left: half-written folders go, a checkpoint that stood aside returns."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)
    for path in folder.glob(".old-*"):
        target = path.with_name(path.name.removeprefix(".old-"))
        if target.exists():
            shutil.rmtree(path)
        else:
            path.rename(target)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and p.is_dir()]
    return sorted(found, key=_step)


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The checkpoint folder of the highest step, or None; its contents are not looked at."""
    steps = _steps(Path(run_dir) / "checkpoints")
    return steps[-1] if steps else None


def find_run(path: str | Path) -> tuple[Path, Path | None]:
    """The run directory that `path` is or lies in, and which folder inside it was meant, none for the run.

    Inside lie `checkpoints` and its step_N, and the same under a fine-tuning run's `best`. A path that leads
    to no run is returned as it is.
    """
    path = Path(path)
    if not (path / SETTINGS).is_file():
        for whole in (Path(os.path.abspath(path)), path.resolve()):  # a link may stand on either side
            for run in whole.parents[:3]:
                inside = whole.relative_to(run).as_posix()
                known = re.fullmatch(rf"{BEST}|({BEST}/)?checkpoints(/step_\d+)?", inside)
                if known and (run / SETTINGS).is_file():
                    return run, whole
    return path, None


def find_checkpoint(path: str | Path, step: int | None = None) -> tuple[Path, Path]:
    """The run that `path` is or lies in, and the checkpoint folder meant: see `d2v.load`.

    Raises CheckpointError where there is none, ValueError for a `step` of a folder inside a run.
    """
    run, inside = find_run(path)
    tuned = is_tuned(read_settings(run))
    if inside is None:
        if step is not None:
            return run, run / "checkpoints" / f"step_{step}"
        holder = run
        folder = (latest_checkpoint(run / BEST) if tuned else None) or latest_checkpoint(run)
    else:
        if step is not None:
            raise ValueError(f"load: step must be None for a checkpoint folder, got {step}")
        if inside.name.startswith("step_"):
            return run, inside
        holder = inside.parent if inside.name == "checkpoints" else inside
        folder = latest_checkpoint(holder)
    if folder is None:
        raise CheckpointError(f"{path}: no checkpoint in {holder / 'checkpoints'}")
    return run, folder


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a `step_N` folder, verifying the SHA-256 of every file before anything is used.

    A missing, half-written or altered file raises `CheckpointError` naming it and the newest older
    checkpoint that is intact; nothing older is loaded silently.
    """
    path = Path(path)
    try:
        state = _verify(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_intact_before(path)}") from error
    model, optimizer, rng = (safetensors.torch.load_file(path / name) for name in _TENSOR_FILES)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in optimizer.items():
        name, field = key.rsplit(".", 1)
        by_parameter.setdefault(name, {})[field] = tensor
    return Checkpoint(path, state["step"], model, by_parameter, state["trainer"], rng)


def _verify(path: Path) -> dict[str, Any]:
    """`state.json` of an intact checkpoint; `CheckpointError` naming the first bad file otherwise."""
    try:
        state = json.loads((path / STATE).read_text())
        digest, files = state.pop("sha256"), state["files"]
    except OSError as error:
        raise CheckpointError(
            f"{path / STATE}: {error.strerror}: not a checkpoint, or half-written"
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / STATE}: damaged: {error!r}") from error
    if _digest(state) != digest:
        raise CheckpointError(f"{path / STATE}: damaged or altered: its SHA-256 does not match")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path / STATE}: format {state['format']}, this version reads {FORMAT}")
    for name in _TENSOR_FILES:
        try:
            found = _fingerprint(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from error
        if found["bytes"] != files[name]["bytes"]:
            raise CheckpointError(
                f"{path / name}: has {found['bytes']} bytes, {files[name]['bytes']} were saved"
            )
        if found["sha256"] != files[name]["sha256"]:
            raise CheckpointError(f"{path / name}: damaged or altered: its SHA-256 does not match")
    return state


def _intact_before(path: Path) -> str:
    if not re.fullmatch(r"step_\d+", path.name):
        return "no older checkpoint"
    for older in reversed(_older(path.parent, _step(path))):
        try:
            _verify(older)
        except CheckpointError:
            continue
        return f"the newest intact older checkpoint is {older}"
    return "no older checkpoint is intact"


def _older(folder: Path, step: int) -> list[Path]:
    return [p for p in _steps(folder) if _step(p) < step]


def fill_model(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into `model`, cast to its dtypes; raises as `check_fits` does."""
    check_fits(model, tensors, source)
    model.load_state_dict(dict(tensors))


def check_fits(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Keys and shapes must match exactly; nothing is read of the tensors.

    Otherwise `CheckpointError` lists, with counts, what is missing, unexpected and wrongly shaped.
    """
    want = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    problems = {
        "missing": [name for name in want if name not in got],
        "unexpected": [name for name in got if name not in want],
        "wrong shape": [
            f"{name} {got[name]} instead of {shape}"
            for name, shape in want.items()
            if got.get(name, shape) != shape
        ],
    }
    lines = []
    for kind, names in problems.items():
        if names:
            more = ", ..." if len(names) > 10 else ""
            lines.append(f"{len(names)} {kind}: {', '.join(names[:10])}{more}")
    if lines:
        raise CheckpointError(f"{source}: does not fit the model: {'; '.join(lines)}")
