"""What the encoder knows while it is pretrained: probes every `probe.every` steps, on a held-out part.

Linear probe and nearest neighbours of `d2v.probe` on evenly spaced labelled samples, and the effective rank
of their features. Training is not touched: random states and mode are put back, and the clock of the progress
line leaves the time out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from d2vkern._nvtx import phase

from . import rng
from .config import Config
from .data import Labelled, Split, open_labelled
from .health import effective_rank
from .model import Pretraining
from .probe import evenly_spaced, features_of, probe_rows

RANK_ROWS = 512
"""rows of features whose effective rank is taken"""


@dataclass(frozen=True)
class Scores:
    """What one probe found."""

    row: dict[str, float]
    """for metrics.jsonl: "probe/PART/KIND" ("probe/layerN/PART/KIND" if layers are several), feature_rank"""
    line: str
    """the same for people"""


class OnlineProbe:
    """Probes of one run, whose data are opened, and errors found, before the first step.

    data: the run's own data set, probed unless cfg.probe.data names another.
    Raises DataError for data without labels, ValueError for a layer that is not there.
    """

    def __init__(self, cfg: Config, data: str, run_dir: Path) -> None:
        probe, depth = cfg.probe, cfg.model.depth
        for layer in probe.layers:
            if not -depth <= layer < depth:
                raise ValueError(f"config: probe.layers must be in {-depth}..{depth - 1}, got {layer}")
        labelled = open_labelled(probe.data or data, cfg, run_dir=run_dir)
        parts = {name: evenly(split, probe.rows) for name, split in labelled.splits.items()}
        self.labelled = Labelled(parts, labelled.classes, labelled.level, labelled.meta)
        self.layers = probe.layers

    def run(self, model: Pretraining) -> Scores:
        """Probe the student as it is now."""
        device = next(model.parameters()).device
        with rng.preserved(device), phase("probe"):
            row: dict[str, float] = {}
            for layer in self.layers:
                features = {
                    name: features_of(model, split, layer=layer)
                    for name, split in self.labelled.splits.items()
                }
                found = probe_rows(features, self.labelled.level, ("linear", "knn"))
                where = "probe" if len(self.layers) == 1 else f"probe/layer{layer % model.cfg.depth}"
                for kind in ("linear", "knn"):
                    row |= {f"{where}/{part}/{kind}": score for part, score in found[kind].items()}
            held_out = next(name for name in features if name != "train")
            last = features[held_out][0]
            few = torch.from_numpy(last[evenly_spaced(len(last), RANK_ROWS)])
            row["feature_rank"] = float(effective_rank(few))
        said = [
            f"{name.removeprefix('probe/')} {100 * score:.1f}%" for name, score in row.items() if "/" in name
        ]
        return Scores(row, f"{', '.join(said)}, feature rank {row['feature_rank']:.0f}")


def evenly(split: Split, most: int) -> Split:
    """At most `most` samples of a part, evenly spaced, in its order."""
    return split if len(split) <= most else split.select(evenly_spaced(len(split), most))
