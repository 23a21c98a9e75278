"""Gather and scatter of tokens by the compiled extension: csrc/gather.cpp on CPUs, csrc/gather.cu on CUDA."""

from d2vkern.functions import gather as functions

gather_tokens = functions.gather_with(functions.GATHER_FWD.native(), functions.GATHER_BWD.native())
scatter_tokens = functions.scatter_with(
    functions.SCATTER_FWD.native(), functions.SCATTER_BWD.native(), functions.MASK_TOKEN_BWD.native()
)
