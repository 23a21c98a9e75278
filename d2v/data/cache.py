"""Where files derived from data are kept: token blocks, unpacked tables."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """`$D2V_CACHE`, else `d2v` in the user's cache folder."""
    if chosen := os.environ.get("D2V_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d2v"
