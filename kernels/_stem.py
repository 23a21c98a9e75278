"""What the kernels of conv_stem share: where windows lie, weights as a matrix, moments by tiles, tile sizes.

Output row b * T' + t reads the window x[b, t * stride : t * stride + k, :], k * C values that lie side by
side in x [B, T, C]: K runs over (tap, channel), as do the rows of the weights' matrix.
"""

import triton
import triton.language as tl
from torch import Tensor

from d2vkern.kernels._launch import MULTIPROCESSORS
from d2vkern.kernels._moments import add_moments
from d2vkern.kernels._tuning import Config, choose, power_of_two_bucket

WAVE = 16
"""window values up to which a product is made again rather than kept: one step of a matrix instruction"""
WIDE_ROWS = 128 * MULTIPROCESSORS
"""rows below which tiles of 128 leave multiprocessors without work"""


def frames_of(x: Tensor, weight: Tensor, stride: int) -> int:
    """T' of x [B, T, C] and weight [O, C, k]."""
    return (x.shape[1] - weight.shape[2]) // stride + 1


def packed(weight: Tensor, like: Tensor, order: tuple[int, int, int]) -> Tensor:
    """weight [O, C, k] in another order of dimensions, contiguous and in the dtype of `like`."""
    view = weight.permute(order)
    return like.new_empty(view.shape).copy_(view)


def product_config(kernel: str, x: Tensor, m: int, n: int, k: int, wide: bool) -> Config:
    """Tile, warps and stages of a product [m, k] by [k, n] whose operands have x's dtype.

    wide: whether there is enough of it for large tiles.
    """
    if x.element_size() == 2:
        # Two stages of 24 KB fit the 64 KB of LDS of a gfx942.
        large, square, thin = (128, 256, 32, 8, 3), (128, 128, 32, 8, 3), (64, 128, 32, 4, 3)
        tiles = [large, square, (128, 256, 32, 8, 2)] if wide else [thin, square, (64, 256, 32, 8, 3)]
    else:
        tiles = [(64, 64, 16, 8, 2), (64, 64, 16, 4, 2)]
    candidates: list[Config] = []
    for rows, columns, depth, warps, stages in tiles:
        config = {
            "BLOCK_M": _clipped(rows, m),
            "BLOCK_N": _clipped(columns, n),
            "BLOCK_K": _clipped(depth, k),
            "num_warps": warps,
            "num_stages": stages,
        }
        if config not in candidates:
            candidates.append(config)
    bucket = f"{power_of_two_bucket(m=m, k=k)} N{n} bytes{x.element_size()}"
    return choose(kernel, bucket, candidates)


def _clipped(most: int, size: int) -> int:
    """A power of two, at least 16: what matrix instructions take."""
    return max(16, min(most, triton.next_power_of_2(size)))


@triton.jit
def window_start(row, frames, length, STRIDE: tl.constexpr, C: tl.constexpr):
    """int64 [R]: where in x [B, length, C] the windows of output rows begin."""
    return ((row // frames).to(tl.int64) * length + (row % frames).to(tl.int64) * STRIDE) * C


@triton.jit
def add_tile(count, mean, squares, values, first, OUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Unite the moments [R], [R, 1], [R, 1] of rows of OUT with columns first ... first + BLOCK_N - 1.

    values: fp32 [R, BLOCK_N], zero beyond the last column.
    """
    width = tl.minimum(OUT - first, BLOCK_N).to(tl.float32)
    # [R, 1]
    tile_mean = tl.div_rn(tl.sum(values, 1), width)[:, None]
    centred = values - tile_mean
    if OUT % BLOCK_N != 0:
        centred = tl.where((first + tl.arange(0, BLOCK_N) < OUT)[None, :], centred, 0.0)
    tile_squares = tl.sum(centred * centred, 1)[:, None]
    return add_moments(count, mean, squares, tl.zeros_like(count) + width, tile_mean, tile_squares)


@triton.jit
def load_columns(vector_ptr, column, OUT: tl.constexpr):
    """fp32 [1, N]: a vector over the output channels."""
    return tl.load(vector_ptr + column, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
