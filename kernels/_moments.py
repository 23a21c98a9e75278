"""Triton helpers shared by the kernels: mean and variance that keep their digits whatever the mean.

A set of values is (count, mean, squares), squares being the sum of squared deviations from the mean; its
biased variance is squares / count. Two sets merge by Chan, Golub and LeVeque (1983); one value is the set
(1, x, 0), so that the same step is Welford's update. Sums of x and x^2 would cancel for a large mean. All in
fp32. R rows of a block, D channels.
"""

import triton
import triton.language as tl

from d2vkern.kernels._common import not_below_zero


@triton.jit
def add_moments(count, mean, squares, more_count, more_mean, more_squares):
    """Unite two sets for every element: counts are [R], means and squares [R, D].

    An empty set leaves the other as it is, but its mean must be finite.
    """
    total = count + more_count
    # [R]
    share = more_count / tl.maximum(total, 1.0)
    # [R, D]
    delta = more_mean - mean
    mean += delta * share[:, None]
    # Exactly 0 for a first value, however `/` rounds.
    squares += delta * delta * (count * share)[:, None]
    if more_squares is not None:
        squares += more_squares
    return total, mean, squares


@triton.jit
def merge_rows(count, mean, squares):
    """Unite the sets of all rows of a block: [R], [R, D], [R, D] become a scalar, [D], [D].

    What rounding leaves in the mean (`slip`) is taken out again, so equal values have variance 0.
    """
    total = tl.sum(count, 0)
    inverse = 1.0 / tl.maximum(total, 1.0)
    # [D]
    centre = tl.sum(count[:, None] * mean, 0) * inverse
    # [R, D]
    delta = mean - centre[None, :]
    weighted = count[:, None] * delta
    # [D]
    slip = tl.sum(weighted, 0)
    united = tl.sum(squares + weighted * delta, 0) - slip * slip * inverse
    return total, centre + slip * inverse, not_below_zero(united)
