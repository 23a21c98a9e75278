"""One small call of every public op, by sizes: what the tests of edges run on every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import d2vkern
from d2vkern._backend import backend_names, gaps
from d2vkern.ops.adamw_ema import grad_norm
from d2vkern.ops.mlp import linear

Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """call(backend=..., **inputs, **settings) gives a tensor or several; of the first gradients are taken."""

    stem: str
    call: Callable[..., Any]
    inputs: Callable[[Sizes], dict[str, Tensor]]
    sizes: Sizes
    grads: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    seeded: bool = False
    """whether `seed` is among the settings"""

    def backends(self) -> list[str]:
        """What can run it here beside eager."""
        first = next(iter(self.inputs(self.sizes).values()))
        given = dict(self.settings or {}) if self.stem == "attention" else {}
        names = [name for name in backend_names(self.stem) if name != "eager"]
        return [name for name in names if not gaps(self.stem, name, first, **given)]

    def run(self, backend: str, inputs: Mapping[str, Tensor], **changes: Any) -> dict[str, Tensor]:
        """Outputs by number, gradients by input."""
        wants = backend != "flex"  # it has no backward on a CPU
        leaves = {name: x.detach().clone() for name, x in inputs.items()}
        for name in self.grads if wants else ():
            leaves[name].requires_grad_()
        made = self.call(backend=backend, **leaves, **{**(self.settings or {}), **changes})
        outputs = [made] if isinstance(made, Tensor) else [x for x in made if isinstance(x, Tensor)]
        results = {str(i): output.detach() for i, output in enumerate(outputs)}
        if self.grads and wants:
            first = outputs[0]
            dout = torch.linspace(0.5, 1.5, first.numel()).view(first.shape).to(first)
            leaves = {name: leaves[name] for name in self.grads}
            gradients = torch.autograd.grad(first, list(leaves.values()), dout)
            results |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
        return results


def outcome(
    case: Case, backend: str, inputs: Mapping[str, Tensor], **changes: Any
) -> dict[str, Tensor] | str:
    """The results, or the error in words."""
    try:
        return case.run(backend, inputs, **changes)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def _attention(extras: bool = False, lengths: bool = False, **settings: Any) -> Callable[..., Tensor]:
    def call(qkv: Tensor, alibi_scale: Tensor | None = None, **given: Any) -> Tensor:
        n, s = qkv.shape[:2] if qkv.dim() > 1 else (1, 1)
        if extras:
            given["positions"] = torch.arange(-1, s - 1).repeat(n, 1)
            given["slopes"] = torch.full((qkv.shape[3] if qkv.dim() > 3 else 1,), 0.5)
        if lengths:
            given["lengths"] = (torch.arange(n) - 1) % (s + 1)  # the last first: S, 0, 1
        return d2vkern.multimask_attention(qkv, alibi_scale=alibi_scale, **given, **settings)

    return call


def _qkv(z: Sizes) -> dict[str, Tensor]:
    return {"qkv": torch.randn(z["N"], z["S"], 3, z["H"], z["Dh"])}


def _qkv_and_scale(z: Sizes) -> dict[str, Tensor]:
    return _qkv(z) | {"alibi_scale": torch.linspace(1.3, -0.4, z["H"])}


def _plan(samples: int, tokens: int) -> d2vkern.MaskPlan:
    return d2vkern.random_mask(torch.arange(samples), 3, tokens, prob=0.4)


def _gather(
    x: Tensor, extra: Tensor, positions: Tensor, per_mask: Tensor, plan: Any = None, **given: Any
) -> Tensor:
    return d2vkern.gather_tokens(x, plan or _plan(2, 7), extra, positions, per_mask, **given)


def _scatter(x: Tensor, plan: Any = None, **given: Any) -> Tensor:
    return d2vkern.scatter_tokens(x, plan or _plan(2, 7), 0.5, **given)


def _loss(beta: float) -> Callable[..., Any]:
    def call(pred: Tensor, target: Tensor, plan: Any = None, **given: Any) -> Any:
        return d2vkern.masked_regression_loss(pred, target, plan or _plan(2, 7), beta, **given)

    return call


def _block_plan(x: Tensor, w: Tensor, b: Tensor, plan: Any = None, **given: Any) -> Tensor:
    return d2vkern.conv_block_1d(x, w, b, 2, plan=plan or _plan(2, 7), **given)


def _block_rows(x: Tensor, w: Tensor, b: Tensor, **given: Any) -> Tensor:
    rows = torch.tensor([[1, 3, 4], [0, 2, 6]])
    return d2vkern.conv_block_1d(x, w, b, 2, True, rows=rows, **given)


def _targets(norm: Any, final: Any) -> Callable[..., Tensor]:
    return lambda first, second, **given: d2vkern.layer_targets([first, second], norm, final, **given)


def _ema(teacher: Tensor, student: Tensor, backend: str) -> list[Tensor]:
    teachers, copies = [teacher.clone()], [teacher.half()]
    d2vkern.ema_update_(teachers, [student], 0.9, copies, backend=backend)
    return teachers + copies


def _adamw(
    p: Tensor, g: Tensor, teacher: Tensor, clip: Tensor, backend: str, found_inf: Tensor | None = None
) -> list[Tensor]:
    p, teacher = torch.nn.Parameter(p.clone()), teacher.clone()
    p.grad = g.clone()
    copies = [p.detach().half(), teacher.half()]
    optimizer = d2vkern.AdamWEMA(
        [p], 0.1, teacher=[teacher], copies=copies[:1], teacher_copies=copies[1:],
        capturable=found_inf is not None, backend=backend,
    )  # fmt: skip
    optimizer.step(clip_factor=clip, ema_decay=0.9, found_inf=found_inf)
    return [p.detach(), teacher, *copies, *(optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq"))]


def _mask(function: Callable[..., Any], *tokens: Any, **settings: Any) -> Callable[..., list[Tensor]]:
    def call(ids: Tensor, **given: Any) -> list[Tensor]:
        plan = function(ids, 3, *tokens, **settings, **given)
        return [plan.mask, plan.ids_keep, plan.slot]

    return call


def _random(**shapes: str) -> Callable[[Sizes], dict[str, Tensor]]:
    """Normal values of these shapes: letters are sizes, numbers are themselves."""

    def make(z: Sizes) -> dict[str, Tensor]:
        return {
            name: torch.randn([z[letter] if letter in z else int(letter) for letter in shape.split()])
            for name, shape in shapes.items()
        }

    return make


def _ids(z: Sizes) -> dict[str, Tensor]:
    return {"ids": torch.arange(z["B"])}


_N = {"N": 2, "S": 5, "H": 2, "Dh": 4}
_NORM = _random(x="N T D", update="N T D", weight="D", bias="D", update_bias="D")
_MLP = _random(x="N D", w1="F D", b1="F", w2="O F", b2="O")
_BLOCK = _random(x="N T C", w="C 4 3", b="C")
_STEM = _random(x="B T C", w="O C 3", nw="O", nb="O")
_PARAMETERS = _random(p="P", g="P", teacher="P", clip="")
_WITH_FOUND = _random(p="P", g="P", teacher="P", clip="")

CASES = {
    "attention": Case(stem="attention", call=_attention(), inputs=_qkv, sizes=_N, grads=("qkv",)),
    "attention, positions": Case(
        stem="attention", call=_attention(True), inputs=_qkv_and_scale, sizes=_N, grads=("qkv", "alibi_scale")
    ),
    "attention, lengths": Case(
        stem="attention", call=_attention(True, True), inputs=_qkv, sizes=_N | {"N": 3}, grads=("qkv",)
    ),
    "attention, lengths, attend": Case(
        stem="attention", call=_attention(lengths=True, padded_rows="attend"), inputs=_qkv,
        sizes=_N | {"N": 3}, grads=("qkv",),
    ),
    "attention, dropout": Case(
        stem="attention", call=_attention(), inputs=_qkv, sizes=_N, grads=("qkv",),
        settings={"seed": 3, "dropout_p": 0.5}, seeded=True,
    ),
    "loss": Case(
        stem="loss", call=_loss(0.0), inputs=_random(pred="N 7 D", target="B 7 D"),
        sizes={"N": 6, "B": 2, "D": 5}, grads=("pred",),
    ),
    "loss, smooth": Case(
        stem="loss", call=_loss(0.5), inputs=_random(pred="N 7 D", target="B 7 D"),
        sizes={"N": 6, "B": 2, "D": 5}, grads=("pred",),
    ),
    "residual_norm": Case(
        stem="residual_norm", call=d2vkern.residual_norm, inputs=_NORM, sizes={"N": 3, "T": 4, "D": 8},
        grads=("x", "update", "weight", "bias", "update_bias"),
    ),
    "residual_norm, dropout": Case(
        stem="residual_norm", call=d2vkern.residual_norm, inputs=_NORM, sizes={"N": 3, "T": 4, "D": 8},
        grads=("x", "update", "weight", "bias", "update_bias"),
        settings={"seed": 3, "dropout_p": 0.5, "drop_path_p": 0.3}, seeded=True,
    ),
    "gelu_mlp": Case(
        stem="mlp", call=d2vkern.gelu_mlp, inputs=_MLP, sizes={"N": 5, "D": 8, "F": 16, "O": 4},
        grads=("x", "w1", "b1", "w2", "b2"),
    ),
    "gelu_mlp, dropout": Case(
        stem="mlp", call=d2vkern.gelu_mlp, inputs=_MLP, sizes={"N": 5, "D": 8, "F": 16, "O": 4},
        grads=("x", "w1", "b1", "w2", "b2"), settings={"seed": 3, "dropout_p": 0.5}, seeded=True,
    ),
    "linear": Case(
        stem="mlp", call=linear, inputs=_random(x="N D", weight="O D", bias="O"),
        sizes={"N": 5, "D": 8, "O": 4}, grads=("x", "weight", "bias"),
    ),
    "conv_stem": Case(
        stem="conv_stem", call=lambda x, w, nw, nb, **given: d2vkern.conv_stem(x, w, 2, nw, nb, **given),
        inputs=_STEM, sizes={"B": 2, "T": 13, "C": 24, "O": 8}, grads=("x", "w", "nw", "nb"),
    ),
    "conv_block_1d": Case(
        stem="conv_block", call=lambda x, w, b, **given: d2vkern.conv_block_1d(x, w, b, 2, True, **given),
        inputs=_BLOCK, sizes={"N": 2, "T": 9, "C": 8}, grads=("x", "w", "b"),
    ),
    "conv_block_1d, widths": Case(
        stem="conv_block", call=d2vkern.conv_block_1d, inputs=_random(x="N T C", weight="O C 3", bias="O"),
        sizes={"N": 2, "T": 5, "C": 8, "O": 4}, grads=("x", "weight", "bias"),
    ),
    "conv_block_1d, plan": Case(
        stem="conv_block", call=_block_plan, inputs=_BLOCK, sizes={"N": 2, "T": 7, "C": 8},
        grads=("x", "w", "b"),
    ),
    "conv_block_1d, rows": Case(
        stem="conv_block", call=_block_rows, inputs=_BLOCK, sizes={"N": 2, "T": 7, "C": 8},
        grads=("x", "w", "b"),
    ),
    "conv_block_2d": Case(
        stem="conv_block", call=lambda x, w, b, **given: d2vkern.conv_block_2d(x, w, b, 2, True, **given),
        inputs=_random(x="N H W C", w="C 4 3 3", b="C"), sizes={"N": 1, "H": 2, "W": 3, "C": 8},
        grads=("x", "w", "b"),
    ),
    "gather_tokens": Case(
        stem="gather", call=_gather,
        inputs=_random(x="B T D", extra="E D", positions="T D", per_mask="N T D"),
        sizes={"B": 2, "N": 6, "T": 7, "D": 5, "E": 1}, grads=("x", "extra", "positions", "per_mask"),
    ),
    "scatter_tokens": Case(
        stem="gather", call=_scatter, inputs=_random(x="N S D"), sizes={"N": 6, "S": 5, "D": 5},
        grads=("x",), settings={"seed": 3}, seeded=True,
    ),
    "targets, instance": Case(
        stem="targets", call=_targets("instance", "layer"), inputs=_random(first="B T D", second="B T D"),
        sizes={"B": 2, "T": 7, "D": 5},
    ),
    "targets, layer": Case(
        stem="targets", call=_targets("layer", "instance"), inputs=_random(first="B T D", second="B T D"),
        sizes={"B": 2, "T": 7, "D": 5},
    ),
    "targets, batch": Case(
        stem="targets", call=_targets("batch", None), inputs=_random(first="B T D", second="B T D"),
        sizes={"B": 2, "T": 7, "D": 5},
    ),
    "ema_update_": Case(
        stem="ema", call=_ema, inputs=_random(teacher="P", student="P"), sizes={"P": 40},
    ),
    "AdamWEMA": Case(stem="adamw_ema", call=_adamw, inputs=_PARAMETERS, sizes={"P": 40}),
    "AdamWEMA, found_inf": Case(
        stem="adamw_ema", call=_adamw, inputs=_random(p="P", g="P", teacher="P", clip="", found_inf=""),
        sizes={"P": 40},
    ),
    "grad_norm": Case(
        stem="adamw_ema", call=lambda g, h, **given: grad_norm([g, h], **given),
        inputs=_random(g="P", h="Q 2"), sizes={"P": 5000, "Q": 3},
    ),
    "inverse_block_mask": Case(
        stem="masks", call=_mask(d2vkern.inverse_block_mask, (4, 5), prob=0.6, length=2), inputs=_ids,
        sizes={"B": 2}, settings={"seed": 3}, seeded=True,
    ),
    "span_mask": Case(
        stem="masks", call=_mask(d2vkern.span_mask, 20, prob=0.5, length=3), inputs=_ids, sizes={"B": 2},
        settings={"seed": 3}, seeded=True,
    ),
    "random_mask": Case(
        stem="masks", call=_mask(d2vkern.random_mask, 20, prob=0.5), inputs=_ids, sizes={"B": 2},
        settings={"seed": 3}, seeded=True,
    ),
}  # fmt: skip
