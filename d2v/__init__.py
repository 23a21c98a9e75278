"""data2vec 2.0 for images, speech and text: `load` a model, or make one from a `preset`; `run` pretrains.

Everything heavy is imported when first used, so that `d2v --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config.extras import missing_extra
from .config.presets import preset

if TYPE_CHECKING:
    from d2vkern import __version__

    from .config.toml import CheckpointError
    from .formats.open import load
    from .model import Data2Vec
    from .model.tuned import FineTuned
    from .train.pretrain import run

__all__ = ["CheckpointError", "Data2Vec", "FineTuned", "__version__", "load", "preset", "run"]

_PLACES = {
    "CheckpointError": "d2v.config.toml",
    "Data2Vec": "d2v.model",
    "FineTuned": "d2v.model.tuned",
    "__version__": "d2vkern",
    "load": "d2v.formats.open",
    "run": "d2v.train.pretrain",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'd2v' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_PLACES[name]), name)
    except ModuleNotFoundError as error:
        if hint := missing_extra(error):
            raise ImportError(hint, name=error.name) from error
        raise
