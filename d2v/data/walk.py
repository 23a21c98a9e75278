"""Which files lie below a folder, the same for every modality: what is hidden is left out, links are
followed, every file counts once, and what is not read is named with its reason."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

SYSTEM = frozenset(
    name.lower()
    for name in (
        "__MACOSX",
        "@eaDir",
        "#recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "Thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "Icon\r",
    )
)
"""what operating systems and file servers put beside a user's files"""
BESIDE = frozenset((".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".html", ".pdf", ".yaml",
                    ".yml", ".cls", ".lab", ".trn", ".wrd", ".ltr", ".phn", ".textgrid", ".scp"))  # fmt: skip
"""suffixes of labels and descriptions, which are no samples of pictures or sounds and so are not missed"""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is of a system or a program, and no data of a user."""
    return name.startswith(".") or name.lower() in SYSTEM


@dataclass
class Walk:
    """The files below a folder."""

    root: Path
    files: list[str]
    """relative to root, in order of their names, folder by folder"""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """reason -> files and folders that are not read, relative to root"""

    def leave_out(self, reason: str, name: str) -> None:
        """Name one file or folder that is not read."""
        self.left_out.setdefault(reason, []).append(name)


def suffix_of(name: str) -> str:
    """The last suffix of a file's name, in lower case; of a compressed file the one before as well."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] + suffix if suffix in (".gz", ".zst") else suffix


def walk(root: Path, wanted: Collection[str], beside: Collection[str] = BESIDE) -> Walk:
    """The files at any depth below a folder whose names end in one of `wanted` (in any case).

    Links to files and folders are followed; whatever is reached by several names, as through a link that
    leads back, is taken by one of them, its own before that of a link. Pipes, sockets, broken links, folders
    that may not be read, and files with other suffixes (but `beside`) are in `left_out`. A file as root is
    the only one. Raises OSError when the root itself cannot be read.
    """
    if root.is_file():
        return Walk(root.parent, [root.name])
    os.scandir(root).close()
    found = Walk(root, [])
    taken: dict[tuple[int, int], tuple[bool, str]] = {}
    """identity of a file -> whether a link leads to it, and its name"""
    seen: set[tuple[int, int]] = set()
    folders, behind_links = deque([("", False)]), deque[str]()
    while folders or behind_links:
        folder, linked = folders.popleft() if folders else (behind_links.popleft(), True)
        try:
            place = os.stat(root / folder)
            if (place.st_dev, place.st_ino) in seen:
                continue
            seen.add((place.st_dev, place.st_ino))
            with os.scandir(root / folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            found.leave_out(f"folder cannot be read: {error.strerror}", folder)
            continue
        for entry in listed:
            if is_hidden(entry.name):
                continue
            name = os.path.join(folder, entry.name)
            if entry.is_dir():
                if entry.is_symlink():
                    behind_links.append(name)
                else:
                    folders.append((name, linked))
            elif reason := _unread(entry, wanted, beside):
                found.leave_out(reason, name)
            elif suffix_of(name) in wanted:
                link = linked or entry.is_symlink()
                stat = os.stat(entry.path) if entry.is_symlink() else None
                identity = (stat.st_dev, stat.st_ino) if stat else (place.st_dev, entry.inode())
                first, *others = sorted({(link, name), taken.get(identity, (link, name))})
                taken[identity] = first
                for _, other in others:
                    found.leave_out("another name of a file that is read", other)
    found.files = sorted(name for _, name in taken.values())
    return found


def _unread(entry: os.DirEntry[str], wanted: Collection[str], beside: Collection[str]) -> str:
    """Why a file is not read; empty for one that is, and for one that nobody misses."""
    if not entry.is_file():
        return "broken link" if entry.is_symlink() and not os.path.exists(entry.path) else "not a file"
    suffix = suffix_of(entry.name)
    if suffix in wanted or suffix in beside:
        return ""
    return f"suffix {suffix} is not read" if suffix else "without a suffix"
