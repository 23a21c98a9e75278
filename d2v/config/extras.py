"""Libraries that only the trainer needs: the extra `train` of the distribution."""

from __future__ import annotations

TRAIN = (
    "PIL", "av", "jiwer", "kornia", "matplotlib", "msgspec", "rich", "safetensors", "scipy", "sklearn",
    "soundfile", "tokenizers", "tomli", "tomli_w", "tyro",
)  # fmt: skip
"""import names"""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """One line for a library of the trainer that is missing; None for any other module."""
    library = (error.name or "").partition(".")[0]
    if library not in TRAIN:
        return None
    return f'd2v needs {library}, which is not installed: pip install "d2vkern[train]"'
