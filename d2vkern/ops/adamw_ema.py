"""AdamW on fp32 weights with the data2vec teacher and the low-precision copies updated in the same step.

A drop-in for torch.optim.AdamW (same state, same keys): `step` additionally takes the gradient clip factor
and the teacher's decay, so that clipping, optimizer, moving average and casts are one pass where a backend
can.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from d2vkern._backend import select
from d2vkern._checks import FLOATS, check_choice, check_dtype, check_range, check_shape
from d2vkern._overlap import check_memory
from d2vkern._shards import any_sharded, check_same_shards, local, replicated
from d2vkern.ops.ema import check_lists, ema_update_
from d2vkern.reference.adamw_ema import decay_unless

_MASTER_DTYPES = (torch.float32, torch.float64)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE = ("step", *_MOMENTS)
_Attached = Mapping[Tensor, Tensor] | Sequence[Tensor | None] | None
_T = TypeVar("_T")


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """L2 norm of all gradients together: what clipping compares with its limit.

    grads: any floating dtypes, shapes and layouts; on several devices, too.
    Returns a 0-dim tensor on the first one's device, fp32 (fp64 where one of them is fp64), not read on the
    host; a NaN or inf shows in it. No gradients have norm 0. Of DTensors it is a DTensor, whose parts
    `AdamWEMA.step` adds up.
    Source: torch.nn.utils.get_total_norm, whose CPU kernel adds a whole tensor up in fp32 (of an embedding of
    50,000 tokens it loses 4e-4); all backends here keep all digits, and "native" takes all threads.

    Raises TypeError for tensors that are not floating.
    """
    grads = list(grads)
    if not grads:
        return torch.zeros(())
    for i, g in enumerate(grads):
        if g.dtype not in FLOATS:
            check_dtype("grad_norm", f"grads[{i}]", g)
    if any_sharded(grads):
        return torch.nn.utils.get_total_norm(grads)
    return select("adamw_ema", backend, *grads).grad_norm(grads)


@dataclass(slots=True)
class _History:
    """What is known of a step count without reading it, which a capturable optimizer may not.

    Parameters that agree in all but `step` and `version` have the same count. Those change only when a
    gradient is missing or somebody changes the state, so that compiled steps need not be compiled anew.
    """

    step: Tensor
    """the count in the optimizer's state"""
    version: int
    """of its memory, as our last step left it"""
    first: float
    """the count when it was last looked at"""
    begun: int
    """which look that was: counts that were not seen together are not compared"""
    missed: int = 0
    """steps since then without a gradient; steps that found inf are skipped by all"""

    def stale(self) -> bool:
        """Whether somebody else has written to the count since."""
        return not torch.compiler.is_compiling() and self.step._version != self.version


class AdamWEMA(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, plus moving average and copies.

    params: parameters or groups (lr, betas, eps, weight_decay, eps_mode per group), fp32 or fp64.
    eps_mode: "torch" adds eps to sqrt(v) after the bias correction, "fairseq" before it, as
        fairseq/optim/adam.py does and as official data2vec 2.0 training did.
    teacher: the fp32 average of each parameter, as a mapping parameter -> tensor or a list aligned with the
        parameters (None: no average). A mapping may also hold tensors outside the groups. Tensors with
        requires_grad False are copied to their teacher, not averaged.
    copies, teacher_copies: in the same form, bf16 or fp16 tensors that receive each new parameter and
        teacher.
    masters: parameters in bf16 or fp16 are taken too: each gets an fp32 master in its state ("master"), which
        is what the steps change, and receives it rounded in the same pass. Moments are fp32.
    capturable: keep `step` on the device and never read it on the host, for CUDA graphs; lr may be a 0-dim
        tensor.

    Teachers and copies that overlap in memory with each other or with parameters raise ValueError.

    State dicts are torch.optim.AdamW's (step, exp_avg, exp_avg_sq) and go both ways; teachers are not part of
    them, and `capturable` stays what it is here. State may also be put into `state[p]` by hand: before a step
    uses it, it gets the dtypes, devices and strides that steps need, bf16 and fp16 parameters a master.
    amsgrad, maximize and sparse gradients are refused. Parameters may be DTensors (FSDP2), each process
    works on its shards; their gradients, teachers and copies must be distributed like them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        eps_mode: Literal["torch", "fairseq"] = "torch",
        teacher: _Attached = None,
        copies: _Attached = None,
        teacher_copies: _Attached = None,
        capturable: bool = False,
        masters: bool = False,
        backend: str | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and not capturable:
            raise ValueError("adamw_ema: lr must be a float unless capturable, got a tensor")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "eps_mode": eps_mode,
            "capturable": capturable,
        }
        self._masters = masters
        super().__init__(params, defaults)
        self.backend = backend
        self._histories: dict[Tensor, _History] = {}
        self._looks = 0
        self._teachers = self._by_param("teacher", teacher)
        self._copies = self._by_param("copies", copies)
        self._teacher_copies = self._by_param("teacher_copies", teacher_copies)
        pairs = list(self._teachers.items())
        check_lists(
            "adamw_ema",
            [t for _, t in pairs],
            [p for p, _ in pairs],
            [self._teacher_copies.get(p) for p, _ in pairs],
        )
        if missing := self._teacher_copies.keys() - self._teachers.keys():
            raise ValueError(
                f"adamw_ema: teacher_copies must belong to teachers, got {len(missing)} without one"
            )
        for p, low in self._copies.items():
            check_shape("adamw_ema", "copies", low, tuple(p.shape), like="its parameter")
            check_dtype("adamw_ema", "copies", low)
            check_same_shards("adamw_ema", "copies", low, "its parameter", p)
            if p.dtype not in _MASTER_DTYPES:
                raise ValueError("adamw_ema: copies must belong to fp32 parameters, got one of a master's")

        if pairs or self._copies:
            rows = list(dict.fromkeys((*self._teachers, *self._copies, *self._all_params())))
            given = {
                "teacher": self._teachers,
                "copies": self._copies,
                "teacher_copies": self._teacher_copies,
            }
            written = [(name, local([tensors.get(p) for p in rows])) for name, tensors in given.items()]
            check_memory("adamw_ema", written, [("params", local(rows))])

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with every value checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            check_dtype("adamw_ema", "params", p, FLOATS if self._masters else _MASTER_DTYPES)
        if not isinstance(group["lr"], Tensor):
            check_range("adamw_ema", "lr", group["lr"], minimum=0.0)
        for name, beta in zip(("beta1", "beta2"), group["betas"], strict=True):
            check_range("adamw_ema", name, beta, minimum=0.0, below=1.0)
        check_range("adamw_ema", "eps", group["eps"], minimum=0.0)
        check_range("adamw_ema", "weight_decay", group["weight_decay"], minimum=0.0)
        check_choice("adamw_ema", "eps_mode", group["eps_mode"], ("torch", "fairseq"))

    def __getstate__(self) -> dict[str, Any]:
        """torch's, and what is attached: a copied or unpickled optimizer goes on as this one does."""
        attached = ("backend", "_masters", "_teachers", "_copies", "_teacher_copies")
        return super().__getstate__() | {name: getattr(self, name) for name in attached}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also takes the groups and steps of a torch.optim.AdamW state dict."""
        # of an optimizer that is there it changes groups and states
        for group, loaded in zip(self.__dict__.get("param_groups", ()), state["param_groups"], strict=False):
            loaded["capturable"] = group["capturable"]
            if isinstance(group["lr"], Tensor):  # which a CUDA graph may read
                loaded["lr"] = group["lr"].copy_(torch.as_tensor(loaded["lr"]))
            elif isinstance(loaded["lr"], Tensor) and not group["capturable"]:
                loaded["lr"] = float(loaded["lr"])
        super().__setstate__(state)
        self._histories, self._looks = {}, 1
        for group in self.param_groups:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"adamw_ema: {name} must be False, got True in the loaded state")
            group.setdefault("eps_mode", self.defaults["eps_mode"])
            group.setdefault("capturable", self.defaults["capturable"])
            for p in group["params"]:
                if self.state.get(p):
                    self._begin(p, group["capturable"], self._looks)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments and masters of bf16 and fp16 parameters stay fp32.

        A state without a master, of torch.optim.AdamW, gets one from the parameter.
        """
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                if p.dtype in _MASTER_DTYPES or not state_dict["state"].get(key):
                    continue
                given, state = state_dict["state"][key], self.state[p]
                for name in ("exp_avg", "exp_avg_sq", "master"):
                    # torch has cast them to the parameter's dtype
                    state[name] = torch.empty_like(p, dtype=torch.float32).copy_(given.get(name, p).detach())

    def _begin(self, p: Tensor, capturable: bool, look: int) -> _History:
        """Make a parameter's state, or bring what somebody put there to where and how steps need it.

        look: number of the look at step counts that this is part of.
        """
        state, wide = self.state[p], p.dtype if p.dtype in _MASTER_DTYPES else torch.float32
        given = [name for name in _STATE if name in state]
        if given and len(given) < len(_STATE):
            raise ValueError(
                f"adamw_ema: the state of a parameter must have {', '.join(_STATE)}, got {', '.join(given)}"
            )
        device = p.device if capturable else torch.device("cpu")
        first = 0.0
        if not given:
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(p, dtype=wide, memory_format=torch.preserve_format)
        else:
            for name in _MOMENTS:
                state[name] = _beside(p, name, state[name], wide)
            count = torch.as_tensor(state["step"])
            if count.numel() != 1:
                check_shape("adamw_ema", "the state's step", count, ())
            if _is_hidden(count):
                self._looks = look = self._looks + 1
            else:
                first = float(count)
                check_range("adamw_ema", "the state's step", first, minimum=0.0)
            known = self._histories.get(p)
            if known is None or known.step is not count:  # else written to in place, as graphs know it
                state["step"] = count.detach().reshape(()).to(device, torch.float32, copy=True)
        if wide != p.dtype:
            state["master"] = _beside(p, "master", state.get("master", p.detach()), wide)
        version = 0 if torch.compiler.is_compiling() else state["step"]._version
        self._histories[p] = history = _History(state["step"], version, first, look)
        return history

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], _T] | None = None,
        *,
        clip_factor: float | Tensor | None = None,
        ema_decay: float | Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> _T | None:
        """One update; returns the closure's value.

        clip_factor: gradients count times this (a 0-dim tensor is not read on the host); backends may leave
            them scaled in `.grad`.
        ema_decay: see `ema_update_`; None or the number 1 leaves teachers untouched.
        found_inf: 0-dim fp32 tensor on the parameters' device, for `capturable` only; when it is not 0,
            nothing changes. It is not read on the host.
        Parameters without gradient are skipped, their teachers are not.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if isinstance(ema_decay, (int, float)):
            check_range("adamw_ema", "ema_decay", ema_decay, minimum=0.0, maximum=1.0)
            if ema_decay == 1.0:
                ema_decay = None
        if found_inf is not None:
            self._check_found_inf(found_inf)
        clip_factor = replicated(clip_factor)
        updated: set[Tensor] = set()
        for group in self.param_groups:
            for steps, params in self._alike(group, found_inf):
                weights = local([self.state[p].get("master", p) for p in params])
                grads = local([p.grad for p in params if p.grad is not None])
                teachers, copies, teacher_copies = (
                    local([attached.get(p) for p in params])
                    for attached in (self._teachers, self._copies, self._teacher_copies)
                )
                for i, p in enumerate(params):
                    if "master" in self.state[p]:
                        copies[i] = local([p])[0]
                written = [t for t in (*teachers, *copies, *teacher_copies) if t is not None]
                select("adamw_ema", self.backend, *weights, *grads, *written).adamw_ema_(
                    weights,
                    grads,
                    local([self.state[p]["exp_avg"] for p in params]),
                    local([self.state[p]["exp_avg_sq"] for p in params]),
                    steps,
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    eps_mode=group["eps_mode"],
                    clip_factor=clip_factor,
                    teachers=teachers,
                    ema_decay=ema_decay,
                    copies=copies,
                    teacher_copies=teacher_copies,
                    found_inf=found_inf,
                )
                updated.update(params)
        if ema_decay is not None:
            if found_inf is not None:
                ema_decay = decay_unless(found_inf, ema_decay)
            self._update_teachers([p for p in self._teachers if p not in updated], ema_decay)
        return result

    def _check_found_inf(self, found_inf: Tensor) -> None:
        check_shape("adamw_ema", "found_inf", found_inf, ())
        check_dtype("adamw_ema", "found_inf", found_inf, (torch.float32,))
        if not all(group["capturable"] for group in self.param_groups):
            raise ValueError(
                "adamw_ema: found_inf must be None unless capturable: without it the step count lives on the "
                "host, which does not know whether a step was skipped"
            )

    def _alike(
        self, group: dict[str, Any], found_inf: Tensor | None
    ) -> list[tuple[float | list[Tensor], list[Tensor]]]:
        """(steps, parameters) of each call: parameters with a gradient, of one step, dtype and device."""
        buckets: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        counts: list[Tensor] = []
        histories: list[_History] = []
        capturable, look = group["capturable"], None
        for p in group["params"]:
            history = self._histories.get(p)
            if p.grad is None:
                if history is not None:
                    history.missed += 1
                continue
            if p.grad.is_sparse:
                raise ValueError("adamw_ema: gradients must be dense, got a sparse one")
            state = self.state[p]
            if history is None or history.step is not state.get("step") or (capturable and history.stale()):
                if look is None:
                    self._looks = look = self._looks + 1
                history = self._begin(p, capturable, look)
            counts.append(history.step)
            histories.append(history)
            if capturable:
                buckets[history.first, history.begun, history.missed, p.dtype, p.device].append(p)
            else:
                buckets[float(history.step) + 1, p.dtype, p.device].append(p)
        if counts:
            taken = 1.0 if found_inf is None else [(found_inf == 0).float()] * len(counts)
            torch._foreach_add_(counts, taken)
        if capturable and not torch.compiler.is_compiling():
            for history in histories:
                history.version = history.step._version
        return [
            ([self.state[p]["step"] for p in params] if capturable else step, params)
            for (step, *_), params in buckets.items()
        ]

    def _update_teachers(self, params: list[Tensor], decay: float | Tensor) -> None:
        """Teachers of parameters that this step did not change."""
        averaged = [p for p in params if p.requires_grad]
        ema_update_(
            [self._teachers[p] for p in averaged],
            [self.state[p]["master"] if "master" in self.state.get(p, ()) else p for p in averaged],
            decay,
            [self._teacher_copies.get(p) for p in averaged],
            backend=self.backend,
        )
        for p in params:
            if not p.requires_grad:
                self._teachers[p].copy_(p)
                if p in self._teacher_copies:
                    self._teacher_copies[p].copy_(p)

    def _by_param(self, name: str, given: _Attached) -> dict[Tensor, Tensor]:
        if given is None:
            return {}
        if isinstance(given, Mapping):
            return dict(given)
        params = self._all_params()
        if len(given) != len(params):
            raise ValueError(
                f"adamw_ema: {name} must have {len(params)} entries like params, got {len(given)}"
            )
        return {p: tensor for p, tensor in zip(params, given, strict=True) if tensor is not None}


def _beside(p: Tensor, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of a parameter's state in `dtype`, with its device and strides: itself where it is so."""
    check_shape("adamw_ema", f"the state's {name}", value, tuple(p.shape), like="its parameter")
    check_same_shards("adamw_ema", f"the state's {name}", value, "its parameter", p)
    if (value.dtype, value.device, value.stride()) == (dtype, p.device, p.stride()):
        return value
    return torch.empty_like(p, dtype=dtype).copy_(value)


def _is_hidden(count: Tensor) -> bool:
    """Whether its value cannot be read now."""
    if torch.compiler.is_compiling() or count.is_meta:
        return True
    return count.is_cuda and torch.cuda.is_current_stream_capturing()
