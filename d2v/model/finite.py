"""What cannot be read because it is NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import nn


class NotFinite(ValueError):
    """Features, or a head's outputs, that are NaN or infinite: nothing can be read from them."""


def check_finite(
    op: str, what: str, rows: Iterable[tuple[str, np.ndarray]], model: nn.Module | None = None
) -> None:
    """Raise NotFinite unless all rows (name, values) are finite, with weights of the model that are not."""
    for name, values in rows:
        if np.isfinite(values).all():
            continue
        broken = [] if model is None else [k for k, x in model.state_dict().items() if not x.isfinite().all()]
        cause = f", as are values of {broken[0]} in the model" if broken else ""
        raise NotFinite(f"{op}: {what} of {name} are NaN or infinite{cause}")
