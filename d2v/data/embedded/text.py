"""`text`: the English of the running Python's own standard library.

Docstrings, comments, the language reference that `help()` shows, and the licence: a few megabytes that are
on every machine. Tests and installed packages are left out, as distributions differ in them. The text
differs a little between Python versions.

The labelled task: which area of the library a paragraph comes from, among the nine of `AREAS`. Test
paragraphs come from other files than training paragraphs. Areas have unequal weight; on Python 3.11 the
largest one, the internet, holds 23% of the test paragraphs, which is what guessing it would reach.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

AREAS = {
    "concurrency": "asyncio concurrent multiprocessing queue sched selectors signal subprocess threading "
    "_threading_local contextvars",
    "files": "bz2 fileinput filecmp fnmatch genericpath glob gzip io _pyio lzma ntpath os pathlib posixpath "
    "shutil stat tarfile tempfile zipfile zipimport zipapp _compression mmap",
    "graphics": "tkinter turtle turtledemo curses colorsys",
    "internet": "ftplib html http imaplib ipaddress mailbox mimetypes netrc poplib smtplib socket "
    "socketserver ssl urllib webbrowser wsgiref xmlrpc xml email",
    "editor": "idlelib",
    "language": "ast code codeop compileall dis importlib inspect keyword linecache opcode pkgutil "
    "py_compile pyclbr runpy symtable token tokenize modulefinder types typing abc dataclasses enum "
    "functools",
    "numbers": "_pydecimal decimal fractions numbers random statistics datetime _pydatetime calendar "
    "zoneinfo _strptime",
    "system": "argparse cmd configparser getopt getpass gettext locale logging optparse platform shlex site "
    "sysconfig venv ensurepip",
    "testing": "unittest doctest pdb bdb cProfile profile pstats timeit trace traceback tracemalloc warnings "
    "pydoc faulthandler",
}
"""area -> top-level modules and packages, by name; what a Python version lacks is skipped"""

TEST_SHARE = 0.25
"""of the paragraphs of an area"""
MIN_WORDS, MAX_WORDS = 12, 120
"""of a labelled paragraph: shorter ones say too little"""

_OUTSIDE = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_TESTS = {"test", "tests", "idle_test", "_bundled"}
_LEGAL = re.compile(r"copyright|licen[sc]e|permission|warrant", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]{2,}")


def files() -> list[Path]:
    """The library's source files and licence, in an order that does not depend on the file system."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _OUTSIDE | _TESTS and not f.startswith("config-")]
        found += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    licence = [root / "LICENSE.txt"] if (root / "LICENSE.txt").is_file() else []
    return sorted(found, key=lambda f: f.relative_to(root).as_posix()) + licence


def _pieces(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of each docstring and each block of whole-line comments.

    A line that starts with # is a comment unless a string goes on through it, and the syntax tree knows
    where strings are: as exact as `tokenize` and several times faster.
    """
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(node):
                yield node.body[0].lineno, text
        elif isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno is not None:
            inside.update(range(node.lineno + 1, node.end_lineno + 1))
    block: list[str] = []
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        stripped = line.strip()
        if stripped.startswith("#") and number not in inside:
            block.append(stripped.lstrip("#!:").removeprefix(" "))
        elif block:
            yield number - len(block), "\n".join(block)
            block = []


def _prose(file: Path) -> str:
    """The English of one file, in the order of its lines, with blank lines between the pieces."""
    if file.suffix == ".txt":
        return file.read_text(encoding="utf-8")
    with tokenize.open(file) as opened:
        source = opened.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other people's code
        tree = ast.parse(source)
    pieces = [text for _, text in sorted(_pieces(source, tree))]
    if file.name == "topics.py":  # of pydoc_data: one dict with the language reference
        assign = tree.body[-1]
        assert isinstance(assign, ast.Assign)
        pieces += ast.literal_eval(assign.value).values()
    return "\n\n".join(piece.strip() for piece in pieces if _WORD.search(piece))


@functools.lru_cache
def documents() -> tuple[tuple[str, str], ...]:
    """(file, text) of every file of the library that holds English."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = ((file.relative_to(root).as_posix(), _prose(file)) for file in files())
    return tuple((name, text) for name, text in texts if text)


def _is_paragraph(text: str) -> bool:
    """Long enough to tell its area, mostly letters (no tables and diagrams), no licence boilerplate."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    words = len(_WORD.findall(text))
    return MIN_WORDS <= words <= MAX_WORDS and letters > 0.8 * len(text) and not _LEGAL.search(text)


@functools.lru_cache
def paragraphs() -> dict[str, tuple[list[str], list[str]]]:
    """Texts and areas of the labelled paragraphs, for "train" and "test".

    Files go to the test part in an order that only their name decides, until it has its share of the area.
    """
    area_of = {module: area for area, modules in AREAS.items() for module in modules.split()}
    by_area: dict[str, list[tuple[str, list[str]]]] = {area: [] for area in AREAS}
    for name, text in documents():
        area = area_of.get(name.split("/")[0].removesuffix(".py"))
        long_enough = [p.strip() for p in text.split("\n\n") if _is_paragraph(p)]
        if area and long_enough:
            by_area[area].append((name, long_enough))
    parts: dict[str, tuple[list[str], list[str]]] = {"train": ([], []), "test": ([], [])}
    for area, found in by_area.items():
        wanted = TEST_SHARE * sum(len(texts) for _, texts in found)
        taken = 0
        for _, texts in sorted(found, key=lambda f: hashlib.sha256(f[0].encode()).digest()):
            part = "test" if taken + len(texts) / 2 <= wanted else "train"
            taken += len(texts) if part == "test" else 0
            parts[part][0].extend(texts)
            parts[part][1].extend([area] * len(texts))
    return parts
