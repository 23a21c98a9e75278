"""d2vkern: the fused ops of data2vec 2.0, each with an eager reference and swappable backends.

Backends: ``backend=`` argument, ``use_backend(...)``, environment ``D2VKERN_BACKEND``, else automatic;
``python -m d2vkern.info`` shows what runs here. Test helpers stand in `d2vkern.testing`.
"""

from d2vkern._backend import BackendError, use_backend
from d2vkern._context import keep_backend
from d2vkern.ops.adamw_ema import AdamWEMA, grad_norm
from d2vkern.ops.attention import multimask_attention
from d2vkern.ops.conv_block import conv_block_1d, conv_block_2d
from d2vkern.ops.conv_stem import conv_stem
from d2vkern.ops.ema import EMA, ema_update_
from d2vkern.ops.gather import gather_tokens, scatter_tokens
from d2vkern.ops.loss import LossOutput, masked_regression_loss
from d2vkern.ops.masks import MaskPlan, inverse_block_mask, random_mask, span_mask
from d2vkern.ops.mlp import gelu_mlp, linear
from d2vkern.ops.residual_norm import residual_norm
from d2vkern.ops.targets import LayerTargets, layer_targets

__version__ = "0.1.0"

__all__ = [
    "AdamWEMA",
    "BackendError",
    "EMA",
    "LayerTargets",
    "LossOutput",
    "MaskPlan",
    "conv_block_1d",
    "conv_block_2d",
    "conv_stem",
    "ema_update_",
    "gather_tokens",
    "gelu_mlp",
    "grad_norm",
    "inverse_block_mask",
    "keep_backend",
    "layer_targets",
    "linear",
    "masked_regression_loss",
    "multimask_attention",
    "random_mask",
    "residual_norm",
    "scatter_tokens",
    "span_mask",
    "use_backend",
]
