"""README and docs/: every command that they show is run here, or says why it cannot be."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import d2v
import d2vkern
from benchmarks.results_table import ROOT
from d2v.cli.main import COMMANDS, command, main
from d2v.cli.parse import UsageError, parse
from d2v.config.presets import preset
from tests.d2v.tiny_runs import LINES

PAGES = (
    "README.md", "docs/data.md", "docs/finetuning.md", "docs/transformers.md", "docs/performance.md",
    "docs/kernels.md",
)  # fmt: skip
"""pages whose blocks are run, in this order: later ones use runs of earlier ones"""
OTHERS = ("docs/fairseq.md", "docs/install.md", "docs/developing.md", "docs/results.md")
"""pages all of whose blocks are marked"""
PROSE = ("docs/index.md", "docs/results.md", "docs/troubleshooting.md", "CONTRIBUTING.md", "CHANGELOG.md")
"""pages that name commands in sentences, or in blocks that are made of results"""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n(<!-- not run: ([^\n]+) -->\n)?", re.MULTILINE | re.DOTALL)

SHORTER = {
    "image_base": "image_tiny --model.front.channels 3", "audio_base": "audio_tiny", "text_base": "text_tiny",
    "--data.batch 64": "",
}  # fmt: skip
"""what is put in place of what the pages say: presets of minutes in place of those of days"""
ADDED = {
    "train image": "--train.steps 2 --train.device cpu --data.batch 8",
    "train audio": "--train.steps 2 --train.device cpu --data.batch 4 --data.max-seconds 1 "
    "--data.min-seconds 0.3",
    "train text": "--train.steps 2 --train.device cpu --data.batch 4 --data.block 24",
    "finetune": "--train.steps 2 --train.device cpu --train.evaluate-every 2",
    "--task ctc": "--data.batch 4 --data.max-seconds 1 --data.min-seconds 0.3",
    "--task classify": "--data.batch 4",
    "--task sentence": "--data.batch 4",
    "profile": "--steps 1",
}
"""options added to a command that begins with, or holds, these words"""


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str
    reason: str | None
    """why it is not run"""

    @property
    def commands(self) -> list[str]:
        """Lines of a shell, continued ones joined."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(page, m[1], m[2], m[4]) for m in FENCE.finditer(text)]


def shortened(command: str) -> list[str]:
    """The arguments of `d2v` for a line of a page."""
    for long, short in SHORTER.items():
        command = command.replace(long, short)
    words = command.split()
    assert words[0] == "d2v"
    if "--resume" not in words:
        shown = " ".join(words[1:])
        command += "".join(f" {more}" for start, more in ADDED.items() if shown.startswith(start)
                           or (start.startswith("--task") and start in shown))  # fmt: skip
    return shlex.split(command)[1:]


def make_data(folder: Path) -> None:
    """Colour pictures, stereo speech with transcripts, texts, all tiny."""
    rng = np.random.default_rng(0)
    for place, count in (("photos", 24), ("labelled/cat", 10), ("labelled/dog", 10)):
        (folder / place).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (30 + i, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / place / f"{i:02}.{('png', 'jpg')[i % 2]}")
    (folder / "speech").mkdir()
    for i in range(20):
        t = np.arange(9_600 if i else 33_600) / 16_000  # the first is long enough for the published presets
        left = 0.3 * np.sin(2 * np.pi * (200 + 40 * i) * t)
        stereo = np.stack([left, 0.1 * rng.standard_normal(len(t))], 1)
        soundfile.write(folder / "speech" / f"{i:02}.{('wav', 'flac')[i % 2]}", stereo, 16_000)
        (folder / "speech" / f"{i:02}.txt").write_text("AB BA"[: 2 + i % 4])
    (folder / "books").mkdir()
    for i in range(4):
        (folder / "books" / f"{i}.txt").write_text("\n".join(f"{i} {line}" for line in LINES * 12))
    lines = [json.dumps({"text": f"{LINES[i % 2]} {i}", "label": ("good", "bad")[i % 2]}) for i in range(20)]
    (folder / "reviews.jsonl").write_text("\n".join(lines))


def test_every_block_is_run_or_says_why_not() -> None:
    pages = {"README.md", *(f"docs/{path.relative_to(ROOT / 'docs')}" for path in ROOT.glob("docs/**/*.md"))}
    shown = {page for page in pages if blocks(page)}
    assert shown <= {*PAGES, *OTHERS}
    assert all(block.reason for page in OTHERS for block in blocks(page))
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("bash", "python")
            if block.language == "bash" and not block.reason:
                assert all(line.startswith("d2v ") for line in block.commands), block


class Parsed(Exception):
    """A command's arguments were understood."""


def understands(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a command's own parser takes its arguments; nothing is run."""
    name, *rest = words
    module = importlib.import_module(f"d2v.cli.{COMMANDS[name][0].partition(':')[0]}")

    def stop(*given: Any, **named: Any) -> None:
        parse(*given, **named)
        raise Parsed

    monkeypatch.setattr(module, "parse", stop)
    task = rest[rest.index("--task") + 1] if "--task" in rest else "classify"
    encoder = {"classify": "image_base", "ctc": "audio_base", "sentence": "text_base"}[task]
    monkeypatch.setattr("d2v.formats.open.open_encoder", lambda source: (None, preset(encoder)))
    try:
        command(name)(rest)
    except Parsed:
        return True
    return rest[:1] == ["--resume"]  # of finetune, which takes nothing beside it


def commands_not_run() -> list[str]:
    """Lines of `d2v` in marked blocks, also as `python -m d2v`, and in blocks without a fence."""
    lines = [line for page in (*PAGES, *OTHERS) for block in blocks(page) if block.reason
             for line in block.commands]  # fmt: skip
    for page in (*PAGES, *OTHERS, *PROSE):
        lines += re.findall(r"^    (d2v .*)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    return [line[found.end() :] for line in lines if (found := re.search(r"^d2v |python -m d2v ", line))]


@pytest.mark.parametrize("line", commands_not_run())
def test_commands_that_are_not_run_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert understands(shlex.split(line, comments=True), monkeypatch)


@pytest.mark.parametrize(
    "line, wrong",
    [
        ("train image_base --data photos/ --out runs/a --optim.rate 1", "--optim.rate"),
        ("finetune runs/a --tusk classify --data labelled/", "--tusk"),
    ],
)
def test_an_option_that_does_not_exist_is_found(
    line: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=wrong):
        understands(line.split(), monkeypatch)


def options_of(name: str) -> str:
    """What `d2v NAME --help` says, for a preset where it takes one."""
    words = [name, *(["image_tiny"] if name in ("train", "profile") else []), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        main(words)
    return said.getvalue()


def test_commands_and_options_in_sentences_exist() -> None:
    helps: dict[str, str] = {}
    for page in (*PAGES, *OTHERS, *PROSE):
        text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        for module in re.findall(r"python -m\s+([\w.]+)", text):
            assert importlib.util.find_spec(module), (page, module)
        for name, rest in re.findall(r"`d2v\s+(?!needs )([a-z]+)([^`]*)`", text):
            assert name in COMMANDS, (page, name)
            for option in re.findall(r"--[\w.-]+", rest):
                known = helps.setdefault(name, options_of(name))
                assert re.search(rf"{re.escape(option)}\b", known), (page, name, option)


def test_the_index_names_every_command() -> None:
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z]+)` \|", text, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("package", [d2v, d2vkern], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package: ModuleType) -> None:
    page = (ROOT / f"docs/api/{package.__name__}.md").read_text(encoding="utf-8")
    shown = {path.rpartition(".")[2] for path in re.findall(r"^::: ([\w.]+)", page, re.MULTILINE)}
    assert {name for name in package.__all__ if not name.startswith("_")} <= shown


def test_messages_that_troubleshooting_explains_are_in_the_code() -> None:
    code = "".join(path.read_text(encoding="utf-8") for room in ("d2v", "d2vkern")
                   for path in sorted((ROOT / room).rglob("*.py")))  # fmt: skip
    code = re.sub(r"""["']\s*\n\s*f?["']""", "", code)  # a string in several lines
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(rows) > 15
    for row in rows:
        for piece in row.split("..."):
            assert piece.strip() in code, row


def test_what_make_is_asked_for_exists() -> None:
    rules = (ROOT / "Makefile").read_text()
    for page in (*PAGES, *OTHERS, *PROSE):
        for name in re.findall(r"(?:`|^    |^)make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE):
            assert re.search(rf"^{name}:", rules, re.MULTILINE), (page, name)


def test_files_that_pages_name_exist() -> None:
    for page in (*PAGES, *OTHERS, *PROSE):
        text = (ROOT / page).read_text(encoding="utf-8")
        home = (ROOT / page).parent
        for link in re.findall(r"\]\(([^)#\s]+?)(?:#[\w-]+)?\)", text):
            assert link.startswith("https://") or (home / link).exists(), (page, link)


def test_tests_that_pages_name_exist() -> None:
    for page in (*PAGES, *OTHERS, *PROSE):
        text = (ROOT / page).read_text(encoding="utf-8")
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (page, file, name)


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setattr("d2v.train.loop.plot_run", lambda out: [])
    names = {"images": torch.randn(2, 3, 24, 24)}
    done = 0
    for page in PAGES:
        for block in (block for block in blocks(page) if not block.reason):
            if block.language == "python":
                exec(compile(block.text, page, "exec"), dict(names))
                done += 1
                continue
            for line in block.commands:
                assert main(shortened(line)) == 0, (page, line)
                done += 1
    assert done > 20
