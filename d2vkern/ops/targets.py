"""Regression targets of data2vec 2.0: an average of normalised layers, folded while the teacher runs.

Instead of keeping K layers of [B,T,D] until the teacher is done, each is added to one accumulator and can be
freed at once.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from d2vkern._backend import select
from d2vkern._checks import check_choice, check_dtype, check_same_device, check_shape

LayerNormKind = Literal["instance", "layer", "batch"] | None
FinalNormKind = Literal["layer", "instance"] | None


class LayerTargets:
    """Streaming average of normalised layers.

    norm: applied to each layer. "instance": per sample and channel over T, padded frames included; "layer":
        over D; "batch": per channel over all B*T tokens; None: nothing. Biased variance, eps 1e-5, no affine.
    final: applied to the average, "layer", "instance" or None.
    Source: data2vec 2.0, `instance_norm_target_layer` (per layer) and `layer_norm_targets` (average) of
    examples/data2vec/models/data2vec2.py, `make_targets`.

    Targets are constants: no gradient flows into the layers. Statistics and sum are fp32 (fp64 for fp64
    layers).
    """

    def __init__(
        self, norm: LayerNormKind = "instance", final: FinalNormKind = None, *, backend: str | None = None
    ) -> None:
        check_choice("targets", "norm", norm, ("instance", "layer", "batch", None))
        check_choice("targets", "final", final, ("layer", "instance", None))
        self.norm = norm
        self.final = final
        self.backend = backend
        self.layers = 0
        self._sum: Tensor | None = None

    def add(self, layer_out: Tensor) -> None:
        """Fold in one layer [B,T,D], fp32, bf16, fp16 or fp64. It is read once and neither kept nor changed.

        Raises ValueError when shape or device differ from the first layer's, TypeError for other dtypes.
        """
        check_shape("targets", "layer_out", layer_out, ("B", "T", "D"))
        check_dtype("targets", "layer_out", layer_out)
        if self._sum is not None:
            check_shape("targets", "layer_out", layer_out, tuple(self._sum.shape), like="the first layer")
            check_same_device("targets", first_layer=self._sum, layer_out=layer_out)
        # As a block, not a decorator: Dynamo cannot trace a decorated method of an object made in the graph.
        with torch.no_grad():
            self._sum = select("targets", self.backend, layer_out).accumulate(self._sum, layer_out, self.norm)
        self.layers += 1

    def result(self) -> Tensor:
        """The targets [B,T,D], fp32 (fp64 for fp64 layers). Hands out the accumulator and starts a new sum.

        Raises ValueError when no layer was added.
        """
        if self._sum is None:
            raise ValueError("targets: result must follow at least 1 added layer, got 0")
        total, layers = self._sum, self.layers
        self._sum, self.layers = None, 0
        with torch.no_grad():
            return select("targets", self.backend, total).finish(total, layers, self.final)


def layer_targets(
    layers: Iterable[Tensor],
    norm: LayerNormKind = "instance",
    final: FinalNormKind = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`LayerTargets` over a list (or generator) of layers [B,T,D]: the targets [B,T,D]."""
    targets = LayerTargets(norm, final, backend=backend)
    for layer in layers:
        targets.add(layer)
    return targets.result()
