"""Collapse alarms: is the front end, the prediction or the target shrinking to a point or a line?

The loss cannot tell. A data2vec model that collapses lowers its loss, and the target variance that the
original watches may even rise while the front end dies (fairseq issue 5239). So each of the three is
watched by itself, by two numbers over a sample of token rows `[n, D]`:

- deviation: mean over channels of the standard deviation over tokens, 0 when all tokens are equal;
- effective rank: `exp(entropy(s / sum(s)))` of the singular values `s` of the centred rows (Roy and
  Vetterli 2007; RankMe, Garrido et al. 2023): 1 when all tokens lie on a line, D when every direction
  is used alike.

An alarm is a warning with the knob that usually helps. It never stops a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.run import TrainConfig


@dataclass(frozen=True)
class Part:
    """Something that can collapse."""

    short: str
    """in alarm kinds and in the keys of metrics.jsonl"""
    key: str
    """in `out.health`"""
    spoken: str
    knob: str
    """what usually helps"""


PARTS = (
    Part("front", "front", "front end",
         "lower optim.lr, raise ema.end_decay, or for speech use a log-mel front end (fairseq issue 5239)"),
    Part("pred", "prediction", "prediction", "lower optim.lr, lengthen optim.warmup or lower mask.prob"),
    Part("target", "target", "target", "raise ema.decay and ema.end_decay, lower optim.lr or target.top_k"),
)  # fmt: skip

REPEAT_AFTER = 10
"""log lines before the same alarm is printed again"""


def deviation(rows: Tensor) -> Tensor:
    """Mean over channels of the deviation over tokens: rows [n, D] -> 0-dim fp32, 0 for fewer than two rows.

    The 1e-6 under the root is the original's (`pred_var` in data2vec2.py), so 1e-3 means "all equal".
    """
    if rows.shape[0] < 2:
        return rows.new_zeros((), dtype=torch.float32)
    return (rows.float().var(dim=0, unbiased=True) + 1e-6).sqrt().mean()


def effective_rank(rows: Tensor) -> Tensor:
    """exp(entropy) of the normalised singular values of the centred rows: [n, D] -> 0-dim fp64 <= D.

    0 when all rows are equal, NaN when a value is NaN or inf. Computed on the rows' device, in fp64: singular
    values are the roots of the eigenvalues of the smaller Gram matrix, which are right to about 1e-16 of the
    largest, so the rank is that of the singular values to 4 digits and more. On a GPU the eigenvalues are
    waited for.
    """
    if rows.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=rows.device)
    x = rows.detach().double()
    finite = torch.isfinite(x).all()
    x = torch.where(finite, x, 0.0)
    x = x / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)  # whose squares neither overflow nor vanish
    x = x - x.mean(dim=0)
    small = x if x.shape[0] <= x.shape[1] else x.mT
    squares = torch.linalg.eigvalsh(small @ small.mT)
    # what is left of equal rows after the subtraction is rounding, not a direction; nor is what lies below
    # the rounding of the largest eigenvalue
    rounding = (squares[-1] * 32 * torch.finfo(x.dtype).eps).clamp(min=1e-14 * max(x.shape))
    values = torch.where(squares > rounding, squares, 0.0).sqrt()
    total = values.sum()
    rank = torch.special.entr(values / total).sum().exp()
    return torch.where(finite, torch.where(total > 0, rank, 0.0), torch.nan)


@dataclass(frozen=True)
class Health:
    """One part's state at one step."""

    part: Part
    width: int
    variance: float
    """deviation across tokens"""
    rank: float
    """effective rank, at most min(rows, width)"""
    most: int
    """largest rank these rows could have: min(rows - 1, width)"""


def measure(rows: Mapping[str, Tensor]) -> list[Health]:
    """The state of each part that `rows` (`out.health`: key -> [n, D]) has; non-finite rows are left out."""
    parts = [part for part in PARTS if part.key in rows]
    kept = [x[torch.isfinite(x).all(dim=1)] for x in (rows[part.key].detach() for part in parts)]
    if not kept:
        return []
    numbers = torch.stack([f(x).double() for x in kept for f in (deviation, effective_rank)]).tolist()
    return [
        Health(part, x.shape[1], variance, rank, max(min(x.shape[0] - 1, x.shape[1]), 0))
        for part, x, variance, rank in zip(parts, kept, numbers[::2], numbers[1::2], strict=True)
    ]


@dataclass(frozen=True)
class Alarm:
    """A threshold that was crossed."""

    kind: str
    """`<short>_rank` or `<short>_variance`"""
    message: str


def judge(states: list[Health], cfg: TrainConfig) -> list[Alarm]:
    """Alarms of one log step: rank over width below `min_rank`, deviation below `min_variance`.

    Fewer rows than channels bound the rank, so it is compared with the rank the rows could have.
    """
    alarms = []
    for s in states:
        if s.most == 0:
            continue
        name, knob = s.part.spoken, s.part.knob
        if s.variance < cfg.min_variance:
            alarms.append(Alarm(
                f"{s.part.short}_variance",
                f"{name} varies by only {s.variance:.2g} across tokens (below {cfg.min_variance:g}): "
                f"it is collapsing to a point, whatever the loss says: {knob}",
            ))  # fmt: skip
        if s.rank < cfg.min_rank * s.most:
            alarms.append(Alarm(
                f"{s.part.short}_rank",
                f"{name} rank {s.rank:.1f} of {s.most} (below {cfg.min_rank:.0%}): "
                f"it is collapsing to few directions, whatever the loss says: {knob}",
            ))  # fmt: skip
    return alarms


class AlarmLog:
    """Decides which alarms are printed: each kind at most once in `REPEAT_AFTER` log lines."""

    def __init__(self) -> None:
        self._line = 0
        self._printed: dict[str, int] = {}

    def fresh(self, alarms: list[Alarm]) -> list[Alarm]:
        """The alarms of this log line that have not been printed lately; call once per line."""
        self._line += 1
        due = [a for a in alarms if self._line - self._printed.get(a.kind, -REPEAT_AFTER) >= REPEAT_AFTER]
        for alarm in due:
            self._printed[alarm.kind] = self._line
        return due
