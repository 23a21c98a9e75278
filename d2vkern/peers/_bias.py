"""The dense bias and key lengths that the peers of attention share.

N sequences, S tokens, H heads; formulas and their conventions are eager's (d2vkern/reference/attention.py).
"""

import torch
from torch import Tensor

from d2vkern.reference.attention import clamped, distances, is_padded, key_bias, without_padding


def head_factor(slopes: Tensor, alibi_scale: Tensor | None) -> Tensor:
    """[H] slope * max(alibi_scale, 0) in fp32; its gradient reaches alibi_scale alone."""
    slopes = slopes.detach().float()
    return slopes if alibi_scale is None else slopes * clamped(alibi_scale.float())


def real_keys(lengths: Tensor, s: int) -> Tensor:
    """[N] keys that a sequence attends to: its length, and S where that is 0, so that no softmax is empty."""
    return torch.where(lengths > 0, lengths, s)


def qkv_of(qkv: Tensor, lengths: Tensor | None, padded_rows: str) -> Tensor:
    """qkv, and with lengths a copy that has no NaN where it is padding."""
    return qkv if lengths is None else without_padding(qkv, lengths, padded_rows == "zero")


def dense_bias(
    positions: Tensor, slopes: Tensor, alibi_scale: Tensor | None, lengths: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[N,H,S,S] in `dtype`, computed in fp32: minus the weighted distances, -inf at padded keys.

    The cast comes last and is never left to the attention kernel: fp32 masks beside bf16 queries were read as
    if they were bf16 on Hopper (PyTorch pull request 191612). Rounding is relative, so it is least where the
    bias is small, which is where the softmax looks.
    """
    factor = head_factor(slopes, alibi_scale)
    bias = distances(positions, torch.float32) * -factor.view(-1, 1, 1)
    if lengths is not None:
        bias = bias + key_bias(lengths, positions.shape[1], torch.float32)
    return bias.to(dtype)


def zero_padded_rows(out: Tensor, lengths: Tensor | None, padded_rows: str) -> Tensor:
    """out [N,S,D] with the rows behind each length set to 0 where `padded_rows` asks for it."""
    if lengths is None or padded_rows != "zero":
        return out
    return out.masked_fill(is_padded(lengths, out.shape[1]).unsqueeze(2), 0)


def key_mask(lengths: Tensor, s: int) -> Tensor:
    """[N,1,1,S] bool, True at the keys that may be attended to."""
    return ~is_padded(real_keys(lengths, s), s)[:, None, None]
