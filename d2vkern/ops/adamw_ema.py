"""AdamW on fp32 weights with the data2vec teacher and the low-precision copies updated in the same step.

A drop-in for torch.optim.AdamW (same state, same keys): `step` additionally takes the gradient clip factor
and the teacher's decay, so that clipping, optimizer, moving average and casts are one pass where a backend
can.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from d2vkern._backend import select
from d2vkern._checks import FLOATS, check_choice, check_dtype, check_range, check_shape
from d2vkern._overlap import check_memory
from d2vkern._shards import any_sharded, check_same_shards, local, replicated
from d2vkern.ops._adamw_state import History, beside, is_hidden
from d2vkern.ops._teachers import Attached, Buffers, by_param
from d2vkern.ops.ema import check_lists, ema_update_
from d2vkern.reference.adamw_ema import decay_unless

_MASTER_DTYPES = (torch.float32, torch.float64)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE = ("step", *_MOMENTS)
_Decay = float | Tensor | Callable[[int], float] | None
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


class AdamWEMA(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, plus moving average and copies.

    params: parameters or groups (lr, betas, eps, weight_decay, eps_mode per group), fp32 or fp64.
    eps_mode: "torch" adds eps to sqrt(v) after the bias correction, "fairseq" before it, as
        fairseq/optim/adam.py does and as official data2vec 2.0 training did.
    amsgrad, maximize, differentiable: False; what they ask for is refused.
    foreach, fused: taken as torch's and change nothing: a step is fused where a backend can.
    teacher: the fp32 average of each parameter, as a mapping parameter -> tensor or a list aligned with the
        parameters (None: no average), or by name: a module like `model` (or an EMA of it), or its
        named_parameters(). A mapping or module may also hold tensors outside the groups. Tensors with
        requires_grad False are copied to their teacher, not averaged.
    model: the module that params are of, whose names a teacher given by name has; not needed with params as
        named_parameters(). With it a teacher module's buffers follow the model's at each average.
    teacher_buffers: "average" floating buffers, as timm's ModelEmaV3, or "copy" them, as data2vec 2.0.
        Integers are copied.
    ema_decay: what a step is given where it is given none, for trainers that call `step()`: a number, a 0-dim
        tensor, or a function of the step's number (the first is 1; it counts on from a loaded state) that
        returns a number. Also an attribute. In a CUDA graph and under torch.compile take a tensor instead of
        a function.
    copies, teacher_copies: a mapping or list, bf16 or fp16 tensors that receive each new parameter and
        teacher.
    masters: parameters in bf16 or fp16 are taken too: each gets an fp32 master in its state ("master"), which
        is what the steps change, and receives it rounded in the same pass. Moments are fp32.
    capturable: keep `step` on the device and never read it on the host, for CUDA graphs; lr may be a 0-dim
        tensor.

    Teachers and copies that overlap in memory with each other or with parameters raise ValueError.

    State dicts are torch.optim.AdamW's (step, exp_avg, exp_avg_sq) and go both ways; teachers are not part of
    them, and `capturable` stays what it is here. State may also be put into `state[p]` by hand: before a step
    uses it, it gets the dtypes, devices and strides that steps need, bf16 and fp16 parameters a master.
    Sparse gradients are refused. Parameters may be DTensors (FSDP2), each process
    works on its shards; their gradients, teachers and copies must be distributed like them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        eps_mode: Literal["torch", "fairseq"] = "torch",
        teacher: Attached = None,
        model: torch.nn.Module | None = None,
        teacher_buffers: Literal["average", "copy"] = "average",
        ema_decay: _Decay = None,
        copies: Attached = None,
        teacher_copies: Attached = None,
        capturable: bool = False,
        masters: bool = False,
        backend: str | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and not capturable:
            raise ValueError("adamw_ema: lr must be a float unless capturable, got a tensor")
        unknown = {"amsgrad": amsgrad, "maximize": maximize, "differentiable": differentiable}
        for name, wanted in unknown.items():
            if wanted:
                raise ValueError(f"adamw_ema: {name} must be False, got {wanted}")
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
        self._histories: dict[Tensor, History] = {}
        self._looks = self._updates = 0
        self.ema_decay = ema_decay
        self._teachers, self._copies, self._teacher_copies = (
            by_param(name, given, self.param_groups, model)
            for name, given in (("teacher", teacher), ("copies", copies), ("teacher_copies", teacher_copies))
        )
        self._buffers: Buffers | None = None
        if isinstance(teacher, torch.nn.Module) and model is not None:
            self._buffers = Buffers(teacher, model, teacher_buffers)
        self._attached = self._has_attached()
        if ema_decay is not None and teacher is None:
            raise ValueError("adamw_ema: ema_decay must come with teacher, got none")
        if isinstance(ema_decay, (int, float)):
            check_range("adamw_ema", "ema_decay", ema_decay, minimum=0.0, maximum=1.0)
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

    def _has_attached(self) -> bool:
        """Whether a parameter of the groups has a teacher or copy."""
        params = (p for group in self.param_groups for p in group["params"])
        return any(p in self._teachers or p in self._copies for p in params)

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
        attached = ["backend", "_masters", "ema_decay", "_teachers", "_copies", "_teacher_copies"]
        attached += ["_buffers", "_attached"]
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
        self._histories, self._looks, self._updates = {}, 1, 0
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

    def _begin(self, p: Tensor, capturable: bool, look: int) -> History:
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
                state[name] = beside(p, name, state[name], wide)
            count = torch.as_tensor(state["step"])
            if count.numel() != 1:
                check_shape("adamw_ema", "the state's step", count, ())
            if is_hidden(count):
                self._looks = look = self._looks + 1
            else:
                first = float(count)
                check_range("adamw_ema", "the state's step", first, minimum=0.0)
            known = self._histories.get(p)
            if known is None or known.step is not count:  # else written to in place, as graphs know it
                state["step"] = count.detach().reshape(()).to(device, torch.float32, copy=True)
        if wide != p.dtype:
            state["master"] = beside(p, "master", state.get("master", p.detach()), wide)
        if first > self._updates:
            self._updates = int(first)
        version = 0 if torch.compiler.is_compiling() else state["step"]._version
        self._histories[p] = history = History(state["step"], version, first, look)
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
        ema_decay: see `ema_update_`; the number 1 leaves teachers untouched. None is the optimizer's own;
            without one teachers stay as they are.
        found_inf: 0-dim fp32 tensor on the parameters' device, for `capturable` only; when it is not 0,
            nothing changes. It is not read on the host.
        Parameters without gradient are skipped, their teachers are not.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if found_inf is not None:
            self._check_found_inf(found_inf)
        clip_factor = replicated(clip_factor)
        updated: set[Tensor] = set()
        if self._attached and not self._has_attached():
            raise RuntimeError(
                "adamw_ema: params must be those that teachers and copies were given for, got others in "
                "their place (shard or wrap the model first, then make the optimizer)"
            )
        due = [(group, self._due(group)) for group in self.param_groups]
        ema_decay = self._decay(ema_decay)
        calls = [(group, self._counted(found, group["capturable"], found_inf)) for group, found in due]
        for group, steps, params in ((group, *call) for group, some in calls for call in some):
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
            if self._buffers is not None:
                self._buffers.update(ema_decay, self.backend)
        return result

    def _decay(self, given: float | Tensor | None) -> float | Tensor | None:
        """The decay of the step under way; None: teachers stay."""
        decay: Any = self.ema_decay if given is None else given
        if callable(self.ema_decay):  # else steps do not change what torch.compile would compile anew for
            self._updates += 1
            decay = self.ema_decay(self._updates) if given is None else given
        if isinstance(decay, (int, float)):
            check_range("adamw_ema", "ema_decay", decay, minimum=0.0, maximum=1.0)
        return None if not isinstance(decay, Tensor) and decay == 1.0 else decay

    def _check_found_inf(self, found_inf: Tensor) -> None:
        check_shape("adamw_ema", "found_inf", found_inf, ())
        check_dtype("adamw_ema", "found_inf", found_inf, (torch.float32,))
        if not all(group["capturable"] for group in self.param_groups):
            raise ValueError(
                "adamw_ema: found_inf must be None unless capturable: without it the step count lives on the "
                "host, which does not know whether a step was skipped"
            )

    def _due(self, group: dict[str, Any]) -> list[tuple[Tensor, History]]:
        """The group's parameters with a gradient, and their step counts, begun where need be."""
        due: list[tuple[Tensor, History]] = []
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
            due.append((p, history))
        return due

    def _counted(
        self, due: list[tuple[Tensor, History]], capturable: bool, found_inf: Tensor | None
    ) -> list[tuple[float | list[Tensor], list[Tensor]]]:
        """One step more of each: (steps, parameters) of each call, those of one step, dtype and device."""
        buckets: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for p, history in due:
            if capturable:
                buckets[history.first, history.begun, history.missed, p.dtype, p.device].append(p)
            else:
                buckets[float(history.step) + 1, p.dtype, p.device].append(p)
        if due:
            taken = 1.0 if found_inf is None else [(found_inf == 0).float()] * len(due)
            torch._foreach_add_([history.step for _, history in due], taken)
        if capturable and not torch.compiler.is_compiling():
            for _, history in due:
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
