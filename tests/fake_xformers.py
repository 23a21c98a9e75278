"""xformers' attention in plain PyTorch, as strict as its kernels: stands in where it is not installed.

Semantics of xformers.ops.memory_efficient_attention and BlockDiagonalMask, version 0.0.33: layout [B,M,H,K],
16-byte alignment of a bias, no broadcasting of a bias that wants a gradient, and no gradient for it when q, k
and v want none.
"""

from __future__ import annotations

import importlib.machinery
import math
import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CALLS: list[str] = []
"""the kind of bias of every call"""


@dataclass
class SeqLens:
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens: list[int]) -> SeqLens:
        starts = [0]
        for length in seqlens:
            assert isinstance(length, int) and length > 0
            starts.append(starts[-1] + length)
        return cls(starts)


@dataclass
class BlockDiagonalMask:
    q_seqinfo: SeqLens
    k_seqinfo: SeqLens

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: list[int],
        kv_seqlen: list[int] | None = None,
        *,
        device: torch.device | None = None,
    ) -> BlockDiagonalMask:
        assert kv_seqlen is None or len(q_seqlen) == len(kv_seqlen)
        return cls(SeqLens.from_seqlens(q_seqlen), SeqLens.from_seqlens(kv_seqlen or q_seqlen))

    def materialize(self, shape: tuple[int, int]) -> Tensor:
        q, k = self.q_seqinfo.seqstart_py, self.k_seqinfo.seqstart_py
        if (q[-1], k[-1]) != shape:
            raise ValueError(f"the mask is for {(q[-1], k[-1])} tokens, got {shape}")
        mask = torch.full(shape, -math.inf)
        for i in range(len(q) - 1):
            mask[q[i] : q[i + 1], k[i] : k[i + 1]] = 0
        return mask


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | BlockDiagonalMask | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
) -> Tensor:
    CALLS.append(type(attn_bias).__name__)
    for tensor in (query, key, value):
        if tensor.dim() != 4 or tensor.stride(-1) != 1 or tensor.shape[-1] % 8:
            raise NotImplementedError(
                "query, key and value must be [B,M,H,K], K contiguous and a multiple of 8"
            )
    bias: Tensor | None
    if isinstance(attn_bias, BlockDiagonalMask):
        if query.shape[0] != 1:
            raise ValueError("a block-diagonal mask needs a batch of 1")
        bias = attn_bias.materialize((query.shape[1], key.shape[1])).to(query.dtype)
    else:
        bias = attn_bias
    if isinstance(attn_bias, Tensor):
        expected = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        alignment = 16 // attn_bias.element_size()
        if attn_bias.dtype != query.dtype or tuple(attn_bias.shape) != expected:
            raise ValueError(f"the bias must be {query.dtype} {expected}")
        if attn_bias.stride(-1) > 1 or any(stride % alignment for stride in attn_bias.stride()[:-1]):
            raise NotImplementedError(f"the bias is not aligned: strides {attn_bias.stride()}")
        if not any(tensor.requires_grad for tensor in (query, key, value)):
            bias = attn_bias.detach()
    q, k, v = (tensor.transpose(1, 2).float() for tensor in (query, key, value))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    out = F.dropout(scores.softmax(-1), p) @ v
    return out.to(query.dtype).transpose(1, 2)


def modules() -> dict[str, types.ModuleType]:
    """What goes into sys.modules."""
    found = {}
    for name in ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias"):
        found[name] = types.ModuleType(name)
        found[name].__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    found["xformers.ops"].memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    found["xformers.ops.fmha.attn_bias"].BlockDiagonalMask = BlockDiagonalMask  # type: ignore[attr-defined]
    return found
