"""The command `d2v`. Nothing heavy is imported before the arguments are known to be good.

Exit codes: 0 done, or stopped on request; 1 failed while running; 2 wrong arguments, config or data;
130 interrupted twice. Users' errors are one message on stderr; `D2V_TRACEBACK=1` shows the traceback.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from ..config.extras import missing_extra

COMMANDS = {
    "train": ("train:train", "pretrain a preset on a folder of data, or continue a run exactly"),
    "probe": ("features:probe", "accuracy of frozen features: linear probe and kNN"),
    "extract": ("features:extract", "features of every sample to an .npz file"),
    "finetune": ("finetune:finetune", "fine-tune on labels: pictures, sounds, CTC transcripts, sentences"),
    "eval": ("finetune:evaluate", "scores of a fine-tuned run: top-1, WER, GLUE's metrics"),
    "convert": ("convert:convert", "a pretrained model as safetensors, or as a file of the original"),
    "race": ("race:race", "accuracy against training time: data2vec 2.0, data2vec 1, MAE, MLM"),
    "presets": ("show:presets", "list the presets, or print one with the source of its values"),
    "check": ("show:check", "counts, sizes, sample rates and unreadable files of a data set"),
    "profile": ("train:profile", "time, bytes and FLOPs of every hot path of a training step"),
    "plot": ("show:plot", "PNG plots of a run"),
    "demo": ("demo:demo", "pretrain and probe images, speech and text on embedded data"),
}
"""name -> where it is, and what it does"""


def command(name: str) -> Callable[[Sequence[str]], int]:
    """What runs a command; its module is imported here, after its name is known to be good."""
    module, _, function = COMMANDS[name][0].partition(":")
    found: Callable[[Sequence[str]], int] = getattr(
        importlib.import_module(f".{module}", __package__), function
    )
    return found


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: d2v COMMAND ...; `d2v COMMAND --help` explains each", "", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        print(f"d2v: no command {name!r}; nearest: {near}\n\n{_overview()}", file=sys.stderr)
        return 2
    try:
        return command(name)(rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (hint := missing_extra(error)):
            print(hint, file=sys.stderr)
            return 2
        code = _code(error)
        if code is None or os.environ.get("D2V_TRACEBACK") == "1":
            raise
        print(error, file=sys.stderr)
        return code


def _code(error: Exception) -> int | None:
    """2 for what the user gave, 1 for what went wrong later, None for a bug, which shows its traceback."""
    if isinstance(error, (ValueError, FileNotFoundError)):
        return 2
    if isinstance(error, OSError):
        return 1
    from ..config.toml import CheckpointError
    from ..train.loop import RunError

    return 2 if isinstance(error, CheckpointError) else 1 if isinstance(error, RunError) else None
