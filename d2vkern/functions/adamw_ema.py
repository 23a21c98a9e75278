"""adamw_ema_ of a backend's kernel."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from d2vkern import _costs
from d2vkern._library import Kernel
from d2vkern.functions.ema import present
from d2vkern.kernels._table import Column

ADAMW_EMA = Kernel(
    "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] teachers, int[] taught, Tensor(e!)[] copies, int[] copied, Tensor(f!)[] teacher_copies, "
    "int[] teacher_copied, Tensor? found_inf, Tensor? clip_tensor, Tensor? decay_tensor, "
    "Tensor? step_tensor, Tensor? lr_tensor, float clip, float decay, float step, float lr, float beta1, "
    "float beta2, float eps, float weight_decay, str eps_mode) -> ()",
    "adamw_ema/fwd",
    lambda *_: None,
    lambda params, grads, exp_avgs, exp_avg_sqs, *call: _costs.adamw_ema(
        params, grads, exp_avgs, exp_avg_sqs, teachers=call[0], copies=call[2], teacher_copies=call[4]
    ),
)


def columns_of(*lists: Any) -> tuple[Column, ...]:
    """The table of a call on a GPU, from the call's first ten arguments."""
    names, some = ("params", "grads", "exp_avgs", "exp_avg_sqs"), ("teachers", "copies", "teacher_copies")
    return (
        *(Column(name, lists[i], written=name != "grads") for i, name in enumerate(names)),
        *(Column(name, *lists[i : i + 2], written=True) for i, name in zip((4, 6, 8), some, strict=True)),
    )


def adamw_ema_with(step: Callable[..., None]) -> Callable[..., None]:
    """adamw_ema_ of a kernel called as ADAMW_EMA, which leaves grads as they are.

    Of clip factor, decay, step and lr the kernel takes the tensor where there is one, else the number.
    """

    def adamw_ema_(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: float | list[Tensor],
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        eps_mode: str,
        clip_factor: float | Tensor | None,
        teachers: Sequence[Tensor | None],
        ema_decay: float | Tensor | None,
        copies: Sequence[Tensor | None],
        teacher_copies: Sequence[Tensor | None],
        found_inf: Tensor | None = None,
    ) -> None:
        if ema_decay is None:
            teachers = teacher_copies = [None] * len(params)
        device, numbers, tensors = params[0].device, [], []
        for value in (clip_factor, ema_decay, steps[0] if isinstance(steps, list) else steps, lr):
            tensors.append(value.to(device) if isinstance(value, Tensor) else None)
            # 1 is as good as None
            numbers.append(1.0 if value is None or isinstance(value, Tensor) else float(value))
        step(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            *present(teachers),
            *present(copies),
            *present(teacher_copies),
            None if found_inf is None else found_inf.to(device),
            *tensors,
            *numbers,
            *betas,
            eps,
            weight_decay,
            eps_mode,
        )

    return adamw_ema_
