"""Masks by the compiled extension: csrc/masks.cpp on CPUs, csrc/masks.cu on CUDA, eager's bits on both."""

from d2vkern.functions.masks import MASKS_FWD, samplers_of

inverse_block_mask, span_mask, random_mask = samplers_of(MASKS_FWD.native())
