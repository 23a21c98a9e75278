"""State that comes from elsewhere: put in by hand, loaded, copied, pickled; on the host and capturable."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2vkern import AdamWEMA, _native, use_backend
from d2vkern.testing import assert_bitwise_equal

META = torch.device("meta")
BACKENDS = [
    "eager",
    pytest.param("native", marks=pytest.mark.skipif(bool(_native.problem()), reason=_native.problem())),
]
both_ways = pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])


class Run:
    """Three parameters, one of them bf16 with a master and one transposed, their teachers and copies."""

    def __init__(self, capturable: bool, eps_mode: str = "fairseq") -> None:
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), (4, 6))]
        self.params = [nn.Parameter(p) for p in (made[0], made[1].bfloat16(), made[2].t())]
        self.teachers = [p.detach().float().clone() for p in self.params]
        self.low = {self.params[0]: torch.zeros(5, 3, dtype=torch.bfloat16)}
        self.optimizer = AdamWEMA(
            [{"params": self.params[:2]}, {"params": self.params[2:], "weight_decay": 0.0}],
            0.05, weight_decay=0.1, eps=1e-3, eps_mode=eps_mode, teacher=self.teachers, copies=self.low,
            capturable=capturable, masters=True,
        )  # fmt: skip

    def steps(self, first: int, last: int) -> None:
        """The second parameter has no gradient in step 1, so its count differs."""
        for number in range(first, last):
            generator = torch.Generator().manual_seed(number)
            for i, p in enumerate(self.params):
                given = torch.randn(p.shape, generator=generator).to(p.dtype)
                p.grad = None if number == 1 and i == 1 else given
            self.optimizer.step(ema_decay=0.9, clip_factor=0.7)

    def weights_of(self, other: Run) -> None:
        with torch.no_grad():
            for ours, theirs in zip(self.tensors(), other.tensors(), strict=True):
                ours.copy_(theirs)

    def tensors(self) -> list[Tensor]:
        return [*(p.detach() for p in self.params), *self.teachers, *self.low.values()]

    def fields(self) -> list[dict[str, Any]]:
        return [dict(self.optimizer.state[p]) for p in self.params]

    def assert_equal(self, other: Run) -> None:
        for ours, theirs in zip(self.tensors(), other.tensors(), strict=True):
            assert_bitwise_equal(ours, theirs)
        for mine, others in zip(self.fields(), other.fields(), strict=True):
            assert mine.keys() == others.keys()
            for name in mine:
                assert_bitwise_equal(mine[name].float(), others[name].float())

    def assert_close(self, other: Run) -> None:
        """Steps on the host and on the device round differently."""
        for ours, theirs in zip(self.tensors(), other.tensors(), strict=True):
            rtol = 1e-2 if ours.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-6)


def by_hand(fresh: Run, old: Run, step: Callable[[Tensor], Any]) -> None:
    for p, fields in zip(fresh.params, old.fields(), strict=True):
        fresh.optimizer.state[p] = {name: t.clone() for name, t in fields.items()}
        fresh.optimizer.state[p]["step"] = step(fields["step"].clone())


def by_dict(fresh: Run, old: Run, step: Callable[[Tensor], Any]) -> None:
    state = copy.deepcopy(old.optimizer.state_dict())
    for fields in state["state"].values():
        fields["step"] = step(fields["step"])
    fresh.optimizer.load_state_dict(state)


STEPS: dict[str, Callable[[Tensor], Any]] = {
    "as it was": Tensor.clone, "int": int, "float": float, "int tensor": Tensor.long,
    "fp64": Tensor.double, "one element": lambda step: step.reshape(1),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("saved", [False, True], ids=["from host", "from capturable"])
@both_ways
@pytest.mark.parametrize("put", [by_hand, by_dict])
def test_a_state_goes_on_as_it_would_have(put: Any, capturable: bool, saved: bool, backend: str) -> None:
    with use_backend(backend):
        for form in STEPS.values():
            old, fresh = Run(saved), Run(capturable)
            old.steps(0, 3)
            fresh.weights_of(old)
            put(fresh, old, form)
            for run in (old, fresh):
                run.steps(3, 6)
            fresh.assert_equal(old) if saved == capturable else fresh.assert_close(old)
            assert [float(fields["step"]) for fields in fresh.fields()] == [6, 5, 6]
            assert {g["capturable"] for g in fresh.optimizer.param_groups} == {capturable}


@both_ways
@pytest.mark.parametrize("put", [by_hand, by_dict])
def test_a_used_optimizer_takes_another_state(put: Any, capturable: bool) -> None:
    """What it knew of its own counts is forgotten; a part of a state may change, too."""
    old, used, fresh = Run(capturable), Run(capturable), Run(capturable)
    old.steps(0, 3)
    used.steps(0, 1)
    for run in (used, fresh):
        run.weights_of(old)
        put(run, old, Tensor.clone)
        run.steps(3, 4)
        run.optimizer.state[run.params[0]]["step"].fill_(40)  # in place, of one parameter
        run.optimizer.state[run.params[2]]["step"] = 9
        run.steps(4, 6)
    used.assert_equal(fresh)
    assert [float(fields["step"]) for fields in used.fields()] == [42, 5, 11]
    other = Run(not capturable)
    other.weights_of(old)
    by_hand(other, old, Tensor.clone)
    other.steps(3, 4)
    by_hand(other, other, Tensor.clone)
    for p, count in ((other.params[0], 40), (other.params[2], 9)):
        other.optimizer.state[p]["step"] = count
    other.steps(4, 6)
    used.assert_close(other)


@both_ways
def test_a_count_that_several_states_share_is_counted_once(capturable: bool) -> None:
    params, shared = [nn.Parameter(torch.ones(2)) for _ in range(3)], torch.tensor(4.0)
    optimizer = AdamWEMA(params, capturable=capturable)
    for p in params:
        optimizer.state[p] = {"step": shared, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
        p.grad = torch.ones(2)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [5, 5, 5]
    assert float(shared) == 4


@both_ways
@pytest.mark.parametrize("form", STEPS)
def test_a_count_lies_where_it_is_counted(form: str, capturable: bool) -> None:
    """Meta parameters stand for those of a GPU; the counts of checkpoints come from the host."""
    p = nn.Parameter(torch.empty(3, device=META))
    optimizer = AdamWEMA([p], capturable=capturable)
    fields = {"step": STEPS[form](torch.tensor(3.0)), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    state = {"state": {0: fields}, "param_groups": optimizer.state_dict()["param_groups"]}
    state["param_groups"][0]["capturable"] = not capturable
    if capturable or form in ("int", "float"):  # else torch puts it on the device, and meta has no values
        optimizer.load_state_dict(state)
        check(optimizer, p, capturable)
    by_hand = AdamWEMA([p], capturable=capturable)
    by_hand.state[p] = dict(fields)
    p.grad = torch.empty(3, device=META)
    by_hand._counted(by_hand._due(by_hand.param_groups[0]), capturable, None)
    check(by_hand, p, capturable)


def check(optimizer: AdamWEMA, p: Tensor, capturable: bool) -> None:
    state = optimizer.state[p]
    assert state["step"].device == (META if capturable else torch.device("cpu"))
    assert (state["step"].dtype, state["step"].shape) == (torch.float32, ())
    assert state["exp_avg"].device == state["exp_avg_sq"].device == META


def test_counts_that_cannot_be_read_are_compared_with_none() -> None:
    """As while a CUDA graph is captured."""
    params = [nn.Parameter(torch.empty(3, device=META)) for _ in range(3)]
    optimizer = AdamWEMA(params, capturable=True)
    for p in params:
        p.grad = torch.empty(3, device=META)
    optimizer.state[params[2]] = {name: torch.empty((3,) * (name != "step"), device=META)
                                  for name in ("step", "exp_avg", "exp_avg_sq")}  # fmt: skip
    optimizer.state[params[1]] = dict(optimizer.state[params[2]])
    for _ in range(2):
        parts = [
            part for _, part in optimizer._counted(optimizer._due(optimizer.param_groups[0]), True, None)
        ]
        assert [len(part) for part in parts] == [1, 1, 1]


def test_a_tensor_learning_rate_stays_the_one_that_a_graph_reads() -> None:
    p, lr = nn.Parameter(torch.ones(2)), torch.tensor(0.1)
    optimizer = AdamWEMA([p], lr, capturable=True)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] is lr and float(lr) == 0.25
    host = AdamWEMA([p], 1.0)
    host.load_state_dict(optimizer.state_dict())
    assert host.param_groups[0]["lr"] == 0.25 and isinstance(host.param_groups[0]["lr"], float)


def deepcopied(run: Run) -> Run:
    return copy.deepcopy(run)


def pickled(run: Run) -> Run:
    file = io.BytesIO()
    torch.save(run, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@both_ways
@pytest.mark.parametrize("copied", [deepcopied, pickled])
def test_a_copied_optimizer_goes_on_with_its_own_tensors(
    copied: Callable[[Run], Run], capturable: bool
) -> None:
    run = Run(capturable)
    run.steps(0, 3)
    twin = copied(run)
    before = [t.clone() for t in run.tensors()]
    twin.steps(3, 5)
    for ours, value in zip(run.tensors(), before, strict=True):
        assert_bitwise_equal(ours, value)
    run.steps(3, 5)
    twin.assert_equal(run)


@both_ways
def test_moments_get_the_strides_of_their_parameter(capturable: bool) -> None:
    """Kernels walk memory; a checkpoint's tensors are contiguous."""
    weights = []
    for contiguous in (False, True):
        p = nn.Parameter(torch.arange(12.0).view(3, 4).t())
        optimizer = AdamWEMA([p], 0.1, capturable=capturable)
        moments = {name: torch.linspace(0.1, 1, 12).view(3, 4).t() for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {
            "step": 2,
            **{k: v.contiguous() if contiguous else v for k, v in moments.items()},
        }
        p.grad = torch.ones_like(p)
        optimizer.step()
        weights.append(p.detach())
    assert_bitwise_equal(*weights)


@both_ways
def test_states_that_do_not_fit(capturable: bool) -> None:
    good = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    for changed, error, words in (
        ({"step": None}, ValueError, "must have step, exp_avg, exp_avg_sq, got exp_avg, exp_avg_sq"),
        ({"step": -1}, ValueError, "the state's step must be >= 0.0, got -1.0"),
        ({"step": float("nan")}, ValueError, "the state's step must be >= 0.0, got nan"),
        ({"step": torch.ones(2)}, ValueError, r"the state's step must have shape \(\), got \(2,\)"),
        (
            {"exp_avg": torch.zeros(3)},
            ValueError,
            r"the state's exp_avg must have shape \(2,\) like its parame",
        ),
        ({"exp_avg_sq": 1.0}, TypeError, "the state's exp_avg_sq must be a tensor, got float"),
    ):
        p = nn.Parameter(torch.ones(2))
        optimizer = AdamWEMA([p], capturable=capturable)
        optimizer.state[p] = {k: v for k, v in {**good, **changed}.items() if v is not None}
        p.grad = torch.ones(2)
        with pytest.raises(error, match=f"adamw_ema: .*{words}"):
            optimizer.step()
        assert torch.equal(p.detach(), torch.ones(2))


def test_a_state_by_hand_before_a_compiled_step() -> None:
    """Its counts cannot be read while tracing."""
    weights = []
    for compiled in (False, True):
        torch._dynamo.reset()
        params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        optimizer = AdamWEMA(params, 0.1, capturable=True, backend="eager")
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for p, count in zip(params, (1, 30), strict=True):
            optimizer.state[p] = {"step": torch.tensor(float(count)),
                                  "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}  # fmt: skip
            p.grad = torch.full((2,), 0.5)
        for _ in range(2):
            step()
        weights.append(torch.cat([p.detach() for p in params]))
    torch.testing.assert_close(*weights)
    torch._dynamo.reset()
