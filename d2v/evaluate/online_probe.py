"""What the encoder knows while it is pretrained: probes every `probe.every` steps, on a held-out part.

Linear probe and nearest neighbours of `d2v.evaluate.probe` on evenly spaced labelled samples, and the
effective rank of their features. Training is not touched: random states and mode are put back, and the clock
of the progress line leaves the time out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from d2vkern._nvtx import phase

from ..config.run import Config
from ..data.open import open_labelled
from ..data.types import Labelled, Split
from ..model import Pretraining
from ..model.finite import NotFinite
from ..train import process
from ..train.backends import use_backends
from ..train.health import effective_rank
from ..train.pretrain import Scores
from .probe import Rows, evenly_spaced, features_of, probe_rows

RANK_ROWS = 512
"""rows of features whose effective rank is taken"""


class OnlineProbe:
    """Probes of one run, whose data are opened, and errors found, before the first step.

    cfg: with the normalisation of the training pictures (`d2v.data.normalisation.normalised`). data: the
    run's own data set, probed unless cfg.probe.data names another.
    Raises DataError for data without labels, ValueError for a layer that is not there.
    """

    def __init__(self, cfg: Config, data: str, run_dir: Path) -> None:
        probe, depth = cfg.probe, cfg.model.depth
        for layer in probe.layers:
            if not -depth <= layer < depth:
                raise ValueError(f"config: probe.layers must be in {-depth}..{depth - 1}, got {layer}")
        self.labelled = probed_data(cfg, data, run_dir)
        self.layers, self.backend = probe.layers, cfg.train.backend

    def run(self, model: Pretraining) -> Scores:
        """Probe the student as it is now; of NaN or infinite features only the line says so."""
        try:
            return self._run(model)
        except NotFinite as error:
            return Scores({}, f"without scores ({error})")

    def _run(self, model: Pretraining) -> Scores:
        device = next(model.parameters()).device
        with process.preserved(device), phase("probe"), use_backends(self.backend):
            depth, several = model.cfg.depth, len(self.layers) > 1
            splits = self.labelled.splits.items()
            found = {
                name: features_of(model, split, layer="all" if several else self.layers[0])
                for name, split in splits
            }
            row: dict[str, float] = {}
            for layer in self.layers:
                number = layer % depth
                width = model.cfg.dim  # of several layers side by side each has its columns
                mine = slice(number * width, (number + 1) * width) if several else slice(width)
                features = {name: (x[:, mine], y) for name, (x, y) in found.items()}
                scores = probe_rows(features, self.labelled.level, ("linear", "knn"))
                where, suffix = (f"probe/layer{number}", f"_layer{number}") if several else ("probe", "")
                for kind in ("linear", "knn"):
                    row |= {f"{where}/{part}/{kind}": score for part, score in scores[kind].items()}
                row[f"feature_rank{suffix}"] = feature_rank(features)
        said = [
            f"{name.removeprefix('probe/')} {100 * score:.1f}%" for name, score in row.items() if "/" in name
        ]
        ranks = "/".join(f"{rank:.0f}" for name, rank in row.items() if name.startswith("feature_rank"))
        return Scores(row, f"{', '.join(said)}, feature rank {ranks}")


def probed_data(cfg: Config, data: str, run_dir: Path) -> Labelled:
    """What `cfg.probe` says of a run on `data`: at most probe.rows samples of each part, evenly spaced."""
    labelled = open_labelled(cfg.probe.data or data, cfg, run_dir=run_dir)
    parts = {name: evenly(split, cfg.probe.rows) for name, split in labelled.splits.items()}
    return dataclasses.replace(labelled, splits=parts)


def feature_rank(rows: Mapping[str, Rows]) -> float:
    """Effective rank of the first held-out part's features, of at most RANK_ROWS of them."""
    x = next(features for name, (features, _) in rows.items() if name != "train")
    return float(effective_rank(torch.from_numpy(x[evenly_spaced(len(x), RANK_ROWS)])))


def evenly(split: Split, most: int) -> Split:
    """At most `most` samples of a part, evenly spaced, in its order."""
    return split if len(split) <= most else split.select(evenly_spaced(len(split), most))
