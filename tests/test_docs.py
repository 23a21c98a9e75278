"""README and docs/: every command that they show is run here, or says why it cannot be."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from benchmarks.results_table import ROOT
from d2v.cli.main import COMMANDS, main
from tests.d2v.tiny_runs import LINES

PAGES = (
    "README.md", "docs/data.md", "docs/finetuning.md", "docs/transformers.md", "docs/performance.md",
    "docs/kernels.md",
)  # fmt: skip
"""pages whose blocks are run, in this order: later ones use runs of earlier ones"""
OTHERS = ("docs/fairseq.md", "docs/install.md", "docs/developing.md")
"""pages all of whose blocks are marked"""

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
    t = np.arange(9_600) / 16_000
    for i in range(20):
        stereo = np.stack([0.3 * np.sin(2 * np.pi * (200 + 40 * i) * t), 0.1 * rng.standard_normal(9_600)], 1)
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


def options_of(command: str) -> str:
    """What `d2v COMMAND --help` says, for a preset where it takes one."""
    words = [command, *(["image_tiny"] if command in ("train", "profile") else []), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        main(words)
    return said.getvalue()


def marked() -> Iterator[tuple[str, str]]:
    for page in (*PAGES, *OTHERS):
        for block in blocks(page):
            for line in block.commands if block.reason else []:
                if line.startswith("d2v "):
                    yield line.split()[1], line


@pytest.mark.parametrize("command", sorted({command for command, _ in marked()}))
def test_options_of_commands_that_are_not_run_exist(command: str) -> None:
    assert command in COMMANDS
    known = options_of(command)
    for name, line in marked():
        for option in re.findall(r"(?<= )--[\w.-]+", line) if name == command else []:
            assert re.search(rf"{re.escape(option)}\b", known), line


def test_what_make_is_asked_for_exists() -> None:
    rules = (ROOT / "Makefile").read_text()
    for page in (*PAGES, *OTHERS):
        for name in re.findall(r"\bmake ([a-z-]+)", (ROOT / page).read_text()):
            assert re.search(rf"^{name}:", rules, re.MULTILINE), (page, name)


def test_files_that_pages_name_exist() -> None:
    for page in (*PAGES, *OTHERS, "docs/index.md", "docs/troubleshooting.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        home = (ROOT / page).parent
        for link in re.findall(r"\]\(([^)#\s]+?)(?:#[\w-]+)?\)", text):
            assert link.startswith("https://") or (home / link).exists(), (page, link)


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
