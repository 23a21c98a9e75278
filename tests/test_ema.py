"""Moving average: parity with the original's step, mixed dtypes, the module form and its schedule."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from d2vkern import use_backend
from d2vkern.ops.ema import EMA, annealed_decay, ema_update_
from d2vkern.testing import assert_bitwise_equal


@pytest.fixture(autouse=True)
def on_eager() -> Iterator[None]:
    """Not the compiled extension, which auto prefers where it is built."""
    with use_backend("eager"):
        yield


def make_pairs(*dtypes: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    shapes = [(3, 4), (5,), (), (0, 2)]
    teacher = [torch.randn(shape) for _ in dtypes for shape in shapes]
    student = [torch.randn(shape).to(dtype) for dtype in dtypes for shape in shapes]
    return teacher, student


def formula(teacher: list[Tensor], student: list[Tensor], decay: float) -> list[Tensor]:
    return [decay * t.double() + (1 - decay) * s.double() for t, s in zip(teacher, student, strict=True)]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_golden_step(goldens: Path, modality: str) -> None:
    start = {k: torch.from_numpy(x) for k, x in np.load(goldens / f"weights_{modality}_base.npz").items()}
    case = {k: torch.from_numpy(x) for k, x in np.load(goldens / f"ema_{modality}_base.npz").items()}
    keys = [k for k in case if k.startswith("_ema.")]
    # The text teacher averages the blocks alone, under their bare names.
    names = [
        k.removeprefix("_ema.") if modality == "image" else "blocks." + k.removeprefix("_ema.") for k in keys
    ]
    trained = [(k, n) for k, n in zip(keys, names, strict=True) if f"delta_int8.{n}" in case]
    assert len(trained) > 30 and len(keys) - len(trained) <= 1
    teacher = [start[k] for k, _ in trained]
    student = [start[n] + case[f"delta_int8.{n}"] / 256 for _, n in trained]
    ema_update_(teacher, student, 0.9)
    for t, (key, _) in zip(teacher, trained, strict=True):
        torch.testing.assert_close(t, case[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.99999])
def test_matches_the_formula_in_mixed_dtypes(decay: float) -> None:
    teacher, student = make_pairs(torch.float32, torch.bfloat16, torch.float16, torch.float64)
    teacher += [torch.randn(4, dtype=torch.float64)]
    student += [torch.randn(4)]
    expected = formula(teacher, student, decay)
    before = [s.clone() for s in student]
    ema_update_(teacher, student, decay)
    for t, e in zip(teacher, expected, strict=True):
        torch.testing.assert_close(t.double(), e, rtol=1e-6, atol=1e-7)
    for s, original in zip(student, before, strict=True):
        assert_bitwise_equal(s, original)


def test_bf16_student_moves_an_fp32_teacher_in_small_steps() -> None:
    teacher, student = [torch.ones(2)], [torch.full((2,), 2.0, dtype=torch.bfloat16)]
    for _ in range(50):
        ema_update_(teacher, student, 0.99999)
    torch.testing.assert_close(teacher[0], torch.full((2,), 2 - 0.99999**50), rtol=1e-6, atol=0)
    assert (teacher[0] > 1.0004).all()


def test_decay_tensor_equals_the_number() -> None:
    teacher, student = make_pairs(torch.float32, torch.bfloat16)
    clones = [t.clone() for t in teacher]
    ema_update_(teacher, student, 0.99999)
    ema_update_(clones, student, torch.tensor(0.99999, dtype=torch.float64))
    for t, clone in zip(teacher, clones, strict=True):
        torch.testing.assert_close(t, clone, rtol=1e-7, atol=1e-9)


def test_copies_receive_the_rounded_teacher() -> None:
    teacher, student = make_pairs(torch.float32)
    copies = [torch.zeros_like(teacher[0], dtype=torch.bfloat16), None, None, None]
    ema_update_(teacher, student, 0.5, copies)
    assert_bitwise_equal(copies[0], teacher[0].bfloat16())
    teacher[0].add_(1)
    ema_update_(teacher, student, 1.0, copies)
    assert_bitwise_equal(copies[0], teacher[0].bfloat16())


def test_a_decay_of_one_touches_nothing_even_with_nan() -> None:
    teacher = [torch.ones(3)]
    ema_update_(teacher, [torch.full((3,), float("nan"))], 1.0)
    assert torch.equal(teacher[0], torch.ones(3))


def test_non_contiguous_tensors_and_parameters() -> None:
    teacher = [torch.randn(4, 6).t(), torch.randn(8, 3)[::2]]
    student = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 3))]
    expected = formula(teacher, [s.detach() for s in student], 0.8)
    ema_update_(teacher, student, 0.8)
    for t, e in zip(teacher, expected, strict=True):
        torch.testing.assert_close(t.double(), e, rtol=1e-6, atol=1e-7)
        assert not t.requires_grad


def test_empty_lists() -> None:
    ema_update_([], [], 0.9)


def test_compiles_without_graph_breaks() -> None:
    teacher, student = make_pairs(torch.float32, torch.bfloat16)
    clones = [t.clone() for t in teacher]
    torch.compile(ema_update_, fullgraph=True, backend="aot_eager")(teacher, student, 0.9)
    ema_update_(clones, student, 0.9)
    for t, clone in zip(teacher, clones, strict=True):
        assert_bitwise_equal(t, clone)


def test_refusals() -> None:
    one, two = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match="ema: student must have 1 tensors like teacher, got 2"):
        ema_update_([one], [one, one], 0.9)
    with pytest.raises(ValueError, match="ema: copies must have 1 tensors like teacher, got 0"):
        ema_update_([one], [one], 0.9, [])
    with pytest.raises(
        ValueError, match=r"ema: student\[1\] must have shape \(3,\) like teacher\[1\], got \(2,\)"
    ):
        ema_update_([one, two], [one, one], 0.9)
    with pytest.raises(
        ValueError, match=r"ema: copies\[0\] must have shape \(2,\) like teacher\[0\], got \(3,\)"
    ):
        ema_update_([one], [one], 0.9, [two])
    with pytest.raises(
        ValueError, match=r"ema: teacher\[0\] must have dtype float32 .* never moves\), got torch.bfloat16"
    ):
        ema_update_([one.bfloat16()], [one], 0.9)
    with pytest.raises(TypeError, match=r"ema: student\[0\] must have dtype .*, got int64"):
        ema_update_([one], [one.long()], 0.9)
    with pytest.raises(ValueError, match="ema: decay must be >= 0.0 and <= 1.0, got 1.1"):
        ema_update_([one], [one], 1.1)
    with pytest.raises(ValueError, match=r"ema: student\[0\] must be on cpu like teacher\[0\], got meta"):
        ema_update_([one], [one.to("meta")], 0.9)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0.9 + 0.09 * 0.1), (5, 0.945), (9, 0.981), (10, 0.99), (11, 0.99), (1000, 0.99)],
)
def test_schedule(step: int, expected: float) -> None:
    assert annealed_decay(step, 0.9, 0.99, 10) == pytest.approx(expected, abs=1e-12)


def test_schedule_without_anneal_and_to_one() -> None:
    assert annealed_decay(1, 0.9, 0.99, 0) == 0.99
    assert annealed_decay(299_999, 0.9997, 1.0, 300_000) < 1.0
    assert annealed_decay(300_000, 0.9997, 1.0, 300_000) == 1.0


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.positions = nn.Parameter(torch.randn(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) + self.positions


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in (*model.parameters(), *model.buffers()):
            p.add_(1)


def test_module_follows_the_schedule() -> None:
    student = Student()
    ema = EMA(student, 0.5, end_decay=0.9, anneal=4)
    weight = student.linear.weight.detach().clone()
    assert (
        torch.equal(ema.module.linear.weight, weight)
        and ema.module.linear.weight is not student.linear.weight
    )
    expected = weight.double()
    for step in range(1, 7):
        move(student)
        ema.update(student, step)
        decay = 0.9 - 0.4 * (1 - step / 4) if step < 4 else 0.9
        expected = decay * expected + (1 - decay) * student.linear.weight.double()
        torch.testing.assert_close(ema.module.linear.weight.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(ema.module.positions, student.positions)
    assert torch.equal(ema.module.norm.running_mean, student.norm.running_mean)
    assert ema.module.norm.num_batches_tracked == student.norm.num_batches_tracked == 6


def test_module_counts_its_own_steps() -> None:
    student = Student()
    ours, theirs = EMA(student, 0.5, end_decay=0.9, anneal=4), EMA(student, 0.5, end_decay=0.9, anneal=4)
    for step in (1, 2, 3):
        move(student)
        ours.update(student, step)
        theirs.update_parameters(student)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert_bitwise_equal(a, b)
    assert ours.n_averaged == 3


def test_module_is_frozen_in_eval_and_forwards() -> None:
    student = Student()
    ema = EMA(student).train()
    assert not ema.module.training and not any(p.requires_grad for p in ema.parameters())
    x = torch.randn(4, 3)
    assert torch.equal(ema(x), student.eval()(x))


def test_module_state_goes_to_and_from_averaged_model() -> None:
    student = Student()
    ema, averaged = EMA(student, 0.5), AveragedModel(student)
    move(student)
    ema.update(student)
    averaged.load_state_dict(ema.state_dict())
    assert torch.equal(averaged.module.linear.weight, ema.module.linear.weight) and averaged.n_averaged == 1
    EMA(student).load_state_dict(averaged.state_dict())


def test_module_of_a_bf16_model_averages_in_fp32() -> None:
    student = Student().bfloat16()
    ema = EMA(student, 0.999)
    assert ema.module.linear.weight.dtype == ema.module.norm.running_mean.dtype == torch.float32
    before = ema.module.linear.weight.clone()
    move(student)
    ema.update(student)
    expected = 0.999 * before + 0.001 * student.linear.weight.float()
    torch.testing.assert_close(ema.module.linear.weight, expected.detach())


def test_module_with_decay_one_stops() -> None:
    student = Student()
    ema = EMA(student, 0.9, end_decay=1.0, anneal=2)
    move(student)
    ema.update(student, 2)
    assert torch.equal(ema.module.positions + 1, student.positions)


def test_module_refusals() -> None:
    ema = EMA(nn.Linear(3, 2))
    with pytest.raises(
        ValueError, match="ema: student must have the parameters of the averaged module, got .* at bias"
    ):
        ema.update(nn.Linear(3, 2, bias=False))
    with pytest.raises(
        ValueError, match=r"ema: weight must have shape \(2, 3\) like the averaged module's, got \(2, 4\)"
    ):
        ema.update(nn.Linear(4, 2))
    with pytest.raises(ValueError, match="ema: end_decay must be >= 0.0 and <= 1.0, got 2"):
        EMA(nn.Linear(3, 2), 0.9, end_decay=2)
