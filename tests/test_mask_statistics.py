"""The distribution of our masks against 2,000 calls of the original (goldens/mask_stats.json).

Every comparison is a two-sample test at row level: rows are independent in both samples, what happens inside
one row is not. So each statistic is a vector per row, and its covariance is estimated over our rows.

* Run lengths, component sizes, component counts, joint probabilities at lags (at most 40 numbers): Wald's
  chi-square d' V^-1 d of the difference d of the means, V = covariance * (1 / our rows + 1 / golden rows)
  plus the golden file's rounding. Histogram bins are merged until the golden holds at least 10 in each.
* Position frequencies (up to 749 numbers): a z-test per position, Bonferroni over positions.

Family level 1e-3, shared equally by all comparisons of this file (Bonferroni). Seeds are fixed, so the result
is too. The last tests sample something slightly different and must fail the same comparisons.
"""

import json
from statistics import NormalDist

import numpy as np
import pytest
import torch

from d2vkern.ops.masks import inverse_block_mask, random_mask, span_mask
from d2vkern.reference import masks as reference
from d2vkern.reference.philox import CENTRES

IMAGE = {
    "image_base": ((14, 14), {"prob": 0.8, "length": 3, "adjust": 0.07}),
    "image_large": ((14, 14), {"prob": 0.75, "length": 3, "adjust": 0.1}),
    "image_huge14": ((16, 16), {"prob": 0.75, "length": 3, "adjust": 0.1}),
}
AUDIO = {
    f"audio_{size}_precomputed_T{tokens}": (tokens, {"prob": prob, "length": 5, "adjust": adjust})
    for size, prob, adjust in (("base", 0.5, 0.05), ("large", 0.55, 0.1))
    for tokens in (249, 499, 749)
}
TEXT = {
    **{f"text_base_T{tokens}": (tokens, {"prob": 0.48}) for tokens in (128, 256, 512)},
    "text_large_T512": (512, {"prob": 0.5}),
}
ROWS, CLONES = 4000, 8
COMPARISONS = 4 * (len(IMAGE) + len(AUDIO) + len(TEXT))
LEVEL = 1e-3 / COMPARISONS


def sample(name, **changed):
    """[ROWS, T] bool mask of a configuration, optionally with a setting changed."""
    ids = torch.arange(ROWS // CLONES) + 1_000_000
    for table, op in ((IMAGE, inverse_block_mask), (AUDIO, span_mask), (TEXT, random_mask)):
        if name in table:
            size, settings = table[name]
            return op(ids, CLONES, size, **{**settings, **changed}, seed=2).mask
    raise KeyError(name)


def wald(per_row, golden_mean, golden_rows, rounding):
    """p-value of equal means: per_row [R, k] ours, golden_mean [k] over golden_rows rows."""
    per_row = torch.as_tensor(per_row, dtype=torch.float64)
    golden_mean = torch.as_tensor(golden_mean, dtype=torch.float64)
    difference = per_row.mean(0) - golden_mean
    spread = per_row.T.cov() * (1 / len(per_row) + 1 / golden_rows)
    variances, axes = torch.linalg.eigh(
        torch.atleast_2d(spread) + torch.eye(len(difference)) * rounding**2 / 12
    )
    # Directions that never vary (a fixed total) hold rounding only.
    free = variances > 1e-9 * variances.max()
    statistic = ((axes.T @ difference)[free] ** 2 / variances[free]).sum()
    return torch.special.gammaincc(free.sum().double() / 2, statistic / 2).item()


def positions_agree(per_row, golden, golden_rows, level=LEVEL):
    """Largest |z| over positions within the Bonferroni bound; golden is rounded to 4 digits."""
    frequency = per_row.double().mean(0)
    golden = torch.tensor(golden, dtype=torch.float64).flatten()
    variance = frequency * (1 - frequency) * (1 / len(per_row) + 1 / golden_rows) + 1e-8 / 12
    z = ((frequency - golden) / variance.sqrt()).abs().max().item()
    return z <= NormalDist().inv_cdf(1 - level / (2 * golden.numel()))


def merged(histogram, golden_rows, total_per_row):
    """Bin edges such that the golden holds at least 10 per bin; the last bin takes the rest."""
    counts = np.array(histogram) * total_per_row * golden_rows
    edges, held = [0], 0.0
    for bin_, count in enumerate(counts):
        held += count
        if held >= 10 and counts[bin_ + 1 :].sum() >= 10:
            edges.append(bin_ + 1)
            held = 0.0
    return edges


def histogram_p(lengths, rows, golden, golden_rows):
    """p-value of a histogram of lengths; row i of ours contributed lengths[rows == i]."""
    bins = len(golden["prob"])
    table = np.bincount(rows * bins + np.minimum(lengths, bins - 1), minlength=ROWS * bins).reshape(
        ROWS, bins
    )
    per_row = golden["n"] / golden_rows
    edges = merged(golden["prob"], golden_rows, per_row)
    ours = np.add.reduceat(table, edges, axis=1)
    theirs = np.add.reduceat(np.array(golden["prob"]), edges) * per_row
    return wald(ours, theirs, golden_rows, rounding=1e-5 * per_row)


def runs(mask):
    """Lengths of the runs of True in each row [R, T], and the row of each."""
    edge = torch.nn.functional.pad(mask, (1, 1)).int().diff(dim=1)
    (rows, starts), (_, ends) = (edge == 1).nonzero().T, (edge == -1).nonzero().T
    return (ends - starts).numpy(), rows.numpy()


def components(visible):
    """4-connected components of each grid [R, h, w]: their sizes, the row of each, the number per row."""
    rows, height, width = visible.shape
    cells = height * width
    label = torch.where(visible, torch.arange(cells).view(height, width), cells)
    while True:
        padded = torch.nn.functional.pad(label, (1, 1, 1, 1), value=cells)
        around = (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
        lowest = torch.stack((label, *around)).amin(0).where(visible, cells)
        if torch.equal(lowest, label):
            break
        label = lowest
    keys = (torch.arange(rows)[:, None] * cells + label.flatten(1))[visible.flatten(1)]
    names, sizes = keys.unique(return_counts=True)
    owner = names // cells
    return sizes.numpy(), owner.numpy(), owner.bincount(minlength=rows).numpy()


@pytest.fixture(scope="module")
def stats(goldens):
    return json.loads((goldens / "mask_stats.json").read_text())


def image_p_values(mask, golden):
    grid = golden["grid"]
    visible = ~mask.view(-1, grid, grid)
    sizes, owner, number = components(visible)
    golden_rows = golden["visible_components_per_mask"]["n"]
    offsets = {key: tuple(map(int, key.split(","))) for key in golden["joint_P_visible_at_offset_dy_dx"]}
    joint = torch.stack(
        [
            (visible[:, dy:, dx:] & visible[:, : grid - dy, : grid - dx]).double().mean((1, 2))
            for dy, dx in offsets.values()
        ],
        1,
    )
    return {
        "component sizes": histogram_p(sizes, owner, golden["visible_component_size"], golden_rows),
        "components": histogram_p(
            number, np.arange(ROWS), golden["visible_components_per_mask"], golden_rows
        ),
        "joint": wald(joint, list(golden["joint_P_visible_at_offset_dy_dx"].values()), golden["rows"], 1e-5),
    }


def line_p_values(mask, golden):
    golden_rows = round(
        golden["masked_run_length"]["mean"]
        * golden["masked_run_length"]["n"]
        / golden["masked_count"]["mean"]
    )
    lags = golden["joint_P_masked_t_and_t_plus_lag_1_to_12"]
    joint = torch.stack(
        [(mask[:, lag:] & mask[:, :-lag]).double().mean(1) for lag in range(1, len(lags) + 1)], 1
    )
    return {
        "masked runs": histogram_p(*runs(mask), golden["masked_run_length"], golden_rows),
        "unmasked runs": histogram_p(*runs(~mask), golden["unmasked_run_length"], golden_rows),
        "joint": wald(joint, lags, golden["rows"], 1e-5),
    }


def p_values(name, mask, golden):
    return image_p_values(mask, golden) if name in IMAGE else line_p_values(mask, golden)


@pytest.mark.parametrize("name", [*IMAGE, *AUDIO, *TEXT])
def test_distribution(name, stats):
    golden = stats[name]
    mask = sample(name)
    assert (mask.sum(1) == golden["masked_count"]["mean"]).all() and golden["masked_count"]["std"] == 0
    values = p_values(name, mask, golden)
    assert min(values.values()) > LEVEL, values
    assert positions_agree(mask, golden["position_frequency"], golden["rows"])


@pytest.mark.parametrize("name", [*IMAGE, *AUDIO])
def test_number_of_centres(name, stats, monkeypatch):
    asked = {}
    draws = reference.row_draws

    def spy(ids, clones, count, purpose, **more):
        asked[purpose] = count
        return draws(ids, clones, count, purpose, **more)

    monkeypatch.setattr(reference, "row_draws", spy)
    sample(name, backend="eager")
    assert asked[CENTRES] == stats[name]["centers_per_row"]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("image_base", {"adjust": 0.1}),  # 6 centres for 5
        ("image_base", {"length": 4, "adjust": 0.25}),
        ("audio_base_precomputed_T249", {"adjust": 0.07}),  # 28 centres for 27
        ("audio_base_precomputed_T749", {"length": 4}),
    ],
)
def test_other_settings_are_told_apart(name, changed, stats):
    assert min(p_values(name, sample(name, **changed), stats[name]).values()) < LEVEL


def test_wrong_borders_are_told_apart(stats):
    for name, rolled in (("image_base", 1), ("audio_base_precomputed_T249", 2)):
        golden = stats[name]
        wrapped = sample(name).roll(rolled, 1)
        assert not positions_agree(wrapped, golden["position_frequency"], golden["rows"])


def test_spans_as_text_are_told_apart(stats):
    golden = stats["text_base_T128"]
    spans = span_mask(torch.arange(ROWS // CLONES), CLONES, 128, prob=62 / 128, length=2).mask
    assert (spans.sum(1) == golden["masked_count"]["mean"]).all()
    assert min(line_p_values(spans, golden).values()) < LEVEL
