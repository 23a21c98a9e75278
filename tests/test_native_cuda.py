"""The compiled extension's CUDA kernels on a GPU: parity, repeats, sizes, layouts, streams, CUDA graphs.

`make sanitize` runs this file under compute-sanitizer. What needs no GPU is tested without one: the kernels'
own source in tests/host, their machine code in tests/test_aot_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from d2vkern import AdamWEMA, ema_update_, gather_tokens, scatter_tokens
from d2vkern._backend import gaps
from d2vkern.ops.masks import MaskPlan, inverse_block_mask, random_mask, span_mask
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, backend_spy

pytestmark = pytest.mark.gpu

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [FP32, FP16, BF16]


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, where the compiled extension has kernels for it."""
    device = torch.device("cuda", torch.cuda.current_device())
    reasons = gaps("ema", "native", torch.zeros(1, device=device))
    if reasons:
        pytest.skip("; ".join(reasons))
    return device


def needs_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, {free / 1e9:.1f} GB are")


# elements, dtype of the other tensors, elements by which the first tensor is off an aligned address
ROWS = [
    (1, FP32, 0),
    (3, BF16, 0),
    (768, FP16, 0),
    (8192, BF16, 0),
    (8193, FP32, 0),
    (20011, BF16, 1),
    (0, FP32, 0),
]


def vectors(device: torch.device, rows: list[tuple[int, torch.dtype, int]] = ROWS) -> list[Tensor]:
    return [torch.randn(count + skipped, device=device)[skipped:] for count, _, skipped in rows]


def others(device: torch.device, rows: list[tuple[int, torch.dtype, int]] = ROWS) -> list[Tensor]:
    return [torch.randn(count, device=device).to(dtype) for count, dtype, _ in rows]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """As far off aligned addresses as they were."""
    copies = []
    for x in tensors:
        skipped = x.data_ptr() % 16 // x.element_size()
        copies.append(torch.cat([x.new_zeros(skipped), x])[skipped:])
    return copies


@pytest.mark.parametrize("decay", [0.25, 0.999])
@pytest.mark.parametrize("on_device", [False, True])
def test_ema(cuda: torch.device, decay: float, on_device: bool) -> None:
    teacher, student = vectors(cuda), others(cuda)
    lows: list[Tensor | None] = [None if s.dtype == FP32 else torch.zeros_like(s) for s in student]
    given = torch.tensor(decay, dtype=torch.float64, device=cuda) if on_device else decay
    exact = [
        t.double() + (1.0 - decay) * (s.double() - t.double()) for t, s in zip(teacher, student, strict=True)
    ]
    eager, again = clones(teacher), clones(teacher)
    ema_update_(eager, student, decay, backend="eager")
    with backend_spy() as calls:
        ema_update_(teacher, student, given, lows, backend="native")
    ema_update_(again, student, given, backend="native")
    assert calls == [("ema", "native")]
    for ours, second, theirs, right, low in zip(teacher, again, eager, exact, lows, strict=True):
        assert_no_worse_than_eager(ours, theirs, right)
        assert_bitwise_equal(second, ours)
        if low is not None:
            assert_bitwise_equal(low, ours.to(low.dtype))


def test_ema_makes_the_bits_of_a_cpu(cuda: torch.device) -> None:
    teacher, student = vectors(cuda), others(cuda)
    on_cpu = [t.cpu() for t in teacher]
    ema_update_(teacher, student, 0.999, backend="native")
    ema_update_(on_cpu, [s.cpu() for s in student], 0.999, backend="native")
    for t, expected in zip(teacher, on_cpu, strict=True):
        assert_bitwise_equal(t.cpu(), expected)


def test_ten_thousand_tensors(cuda: torch.device) -> None:
    sizes = [(1 + i % 700, BF16 if i % 2 else FP32, 0) for i in range(10_000)]
    teacher, student = vectors(cuda, sizes), others(cuda, sizes)
    expected = clones(teacher)
    ema_update_(expected, student, 0.9, backend="eager")
    ema_update_(teacher, student, 0.9, backend="native")
    torch.testing.assert_close(torch.cat(teacher), torch.cat(expected), rtol=1e-6, atol=3e-7)


def test_more_than_two_to_the_31_elements(cuda: torch.device) -> None:
    needs_memory(14)
    size = 2**31 + 7
    teacher = torch.zeros(size, device=cuda)
    student = torch.ones(size, device=cuda, dtype=BF16)
    ema_update_([teacher], [student], 0.75, backend="native")
    assert (teacher == 0.25).all()


class Optimised:
    """Parameters, gradients, teachers and copies of both under one AdamWEMA."""

    def __init__(self, device: torch.device, backend: str, eps_mode: str, capturable: bool) -> None:
        torch.manual_seed(0)
        self.params = [x.requires_grad_() for x in vectors(device)]
        self.teachers, self.grads = vectors(device), others(device)
        self.lows = [torch.zeros_like(p, dtype=BF16).detach() for p in self.params]
        self.teacher_lows = [torch.zeros_like(p, dtype=FP16).detach() for p in self.params]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g.to(p.dtype)
        self.optimizer = AdamWEMA(
            self.params, lr=1e-2, eps=1e-6, eps_mode=eps_mode, teacher=self._of(self.teachers),  # type: ignore[arg-type]
            copies=self._of(self.lows), teacher_copies=self._of(self.teacher_lows), capturable=capturable,
            backend=backend,
        )  # fmt: skip

    def _of(self, tensors: list[Tensor]) -> dict[Tensor, Tensor]:
        return dict(zip(self.params, tensors, strict=True))

    def state(self) -> list[Tensor]:
        """All that a step writes, in one order."""
        moments = [self.optimizer.state[p][name] for p in self.params for name in ("exp_avg", "exp_avg_sq")]
        tensors = [*self.params, *moments, *self.teachers, *self.lows, *self.teacher_lows]
        return [x.detach() for x in tensors]


@pytest.mark.parametrize("eps_mode", ["torch", "fairseq"])
@pytest.mark.parametrize("capturable", [False, True])
def test_adamw_ema(cuda: torch.device, eps_mode: str, capturable: bool) -> None:
    ours, again, eager = (
        Optimised(cuda, name, eps_mode, capturable) for name in ("native", "native", "eager")
    )
    clip = torch.tensor(0.5, device=cuda)
    for step in range(3):
        for run in (ours, again, eager):
            # anew each time: PyTorch's fused kernel scales gradients by the clip factor in place
            for p, g in zip(run.params, run.grads, strict=True):
                p.grad = g.to(p.dtype) * (1.0 + step)
            run.optimizer.step(clip_factor=clip.clone(), ema_decay=0.99)
    for one, second, theirs in zip(ours.state(), again.state(), eager.state(), strict=True):
        assert_bitwise_equal(one, second)
        error = {FP32: 2e-6, FP16: 2e-3, BF16: 1.6e-2}[one.dtype]
        torch.testing.assert_close(one, theirs, rtol=error, atol=error)


def test_found_inf_changes_nothing(cuda: torch.device) -> None:
    run = Optimised(cuda, "native", "torch", True)
    run.optimizer.step(ema_decay=0.9, found_inf=torch.zeros((), device=cuda))
    before = [x.clone() for x in run.state()]
    run.optimizer.step(ema_decay=0.9, found_inf=torch.ones((), device=cuda))
    for one, old in zip(run.state(), before, strict=True):
        assert_bitwise_equal(one, old)


Masks = Callable[..., MaskPlan]
MASKS: dict[str, Masks] = {
    "image": lambda ids, **more: inverse_block_mask(
        ids, 16, (14, 14), prob=0.8, length=3, adjust=0.07, **more
    ),
    "odd grid": lambda ids, **more: inverse_block_mask(ids, 3, (5, 9), prob=0.6, length=4, **more),
    "speech": lambda ids, **more: span_mask(ids, 8, 780, prob=0.5, length=5, adjust=0.05, **more),
    "speech, odd": lambda ids, **more: span_mask(ids, 8, 781, prob=0.5, length=5, adjust=0.05, **more),
    "text": lambda ids, **more: random_mask(ids, 8, 512, prob=0.48, **more),
    "beyond shared memory": lambda ids, **more: span_mask(ids, 1, 20001, prob=0.5, length=5, **more),
    "one token kept": lambda ids, **more: random_mask(ids, 2, 3, prob=0.6, **more),
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("on_device", [False, True])
def test_masks_are_eager_s(cuda: torch.device, make: Masks, on_device: bool) -> None:
    ids = torch.tensor([3, -1, 1 << 40, 7])
    words = {"seed": -7, "epoch": 9}
    given = {name: torch.tensor(value, device=cuda) for name, value in words.items()} if on_device else words
    plan, expected = make(ids.to(cuda), backend="native", **given), make(ids, backend="eager", **words)
    for name in ("mask", "ids_keep", "slot"):
        assert_bitwise_equal(getattr(plan, name).cpu(), getattr(expected, name))


def inputs(
    device: torch.device, dtype: torch.dtype, width: int, skipped: int
) -> tuple[MaskPlan, dict[str, Tensor]]:
    B, M, T = 5, 4, 37
    plan = random_mask(torch.arange(B, device=device), M, T, prob=0.7)
    shapes = {"x": (B, T, width), "extra": (2, width), "positions": (T, width), "per_mask": (B * M, T, width)}
    tensors = {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        flat = torch.randn(count + skipped, device=device).to(dtype)[skipped:]
        tensors[name] = flat.view(shape).requires_grad_()
    return plan, tensors


# width, elements off an aligned address
LAYOUTS = {"768": (768, 0), "1280": (1280, 0), "misaligned": (768, 1), "odd width": (77, 0), "narrow": (8, 0)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "parts", [("x",), ("x", "extra"), ("x", "positions"), ("x", "extra", "positions", "per_mask")]
)
def test_gather(
    cuda: torch.device, dtype: torch.dtype, layout: tuple[int, int], parts: tuple[str, ...]
) -> None:
    plan, tensors = inputs(cuda, dtype, *layout)
    tensors = {name: x for name, x in tensors.items() if name in parts}
    results = {}
    for name in ("native", "again", "eager"):
        out = gather_tokens(plan=plan, backend="eager" if name == "eager" else "native", **tensors)
        torch.manual_seed(1)
        grads = torch.autograd.grad(out, list(tensors.values()), torch.randn_like(out))
        results[name] = [out.detach(), *grads]
    for i, (ours, again, eager) in enumerate(zip(*results.values(), strict=True)):
        assert_bitwise_equal(ours, again)
        if i < 2 or [None, *parts][i] == "per_mask":
            assert_bitwise_equal(ours, eager)
        else:
            error = {FP32: 1e-5, FP16: 2e-3, BF16: 1.6e-2}[dtype]
            torch.testing.assert_close(ours, eager, rtol=error, atol=8 * error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_scatter(cuda: torch.device, dtype: torch.dtype, layout: tuple[int, int]) -> None:
    plan, tensors = inputs(cuda, dtype, *layout)
    x = gather_tokens(tensors["x"], plan, tensors["extra"], backend="eager").detach().requires_grad_()
    ours, again, eager = (
        scatter_tokens(x, plan, 0.3, -5, backend=name) for name in ("native", "native", "eager")
    )
    assert_bitwise_equal(ours, again)
    assert_bitwise_equal(ours[~plan.mask], eager[~plan.mask])
    ulps = 5 if dtype == FP32 else 1
    assert ((ours - eager).abs().float() <= ulps * torch.finfo(dtype).eps * eager.abs().float() + 1e-12).all()
    dout = torch.randn_like(ours)
    grads = [torch.autograd.grad(out, x, dout)[0] for out in (ours, eager)]
    assert_bitwise_equal(*grads)
    assert not scatter_tokens(x, plan, 0.0, 0, backend="native")[plan.mask].any()


def test_offsets_beyond_32_bits(cuda: torch.device) -> None:
    needs_memory(16)
    rows, width = 1 << 12, 1 << 14
    plan = random_mask(torch.arange(rows // 8, device=cuda), 8, 40, prob=0.5)
    assert rows * 40 * width > 2**31
    x = torch.randn(rows, 20, width, device=cuda, dtype=BF16, requires_grad=True)
    out = scatter_tokens(x, plan, 0.0, 0, backend="native")
    last = plan.ids_keep[-1].long()
    assert torch.equal(out[-1, last], x[-1]) and not out[-1][plan.mask[-1]].any()
    (dx,) = torch.autograd.grad(out, x, out)
    assert torch.equal(dx, x)


def test_more_rows_than_one_axis_of_a_grid(cuda: torch.device) -> None:
    rows = 65537
    plan = random_mask(torch.arange(rows, device=cuda), 1, 4, prob=0.5)
    x = torch.randn(rows, 4, 8, device=cuda)
    assert_bitwise_equal(gather_tokens(x, plan, backend="native"), gather_tokens(x, plan, backend="eager"))


@pytest.mark.parametrize("samples", [0, 1])
def test_nothing_and_one_sample(cuda: torch.device, samples: int) -> None:
    plan = random_mask(torch.arange(samples, device=cuda), 2, 4, prob=0.5, backend="native")
    x = torch.randn(samples, 4, 16, device=cuda, requires_grad=True)
    out = gather_tokens(x, plan, backend="native")
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert out.shape == (2 * samples, 2, 16) and dx.shape == x.shape
    assert scatter_tokens(out, plan, 0.1, 0, backend="native").shape == (2 * samples, 4, 16)


def test_side_streams(cuda: torch.device) -> None:
    """Work goes to the current stream: it waits for what that stream was given before."""
    plan = random_mask(torch.arange(64, device=cuda), 16, 196, prob=0.8, backend="native")
    x = torch.zeros(64, 196, 768, device=cuda)
    teacher = [torch.zeros(1 << 20, device=cuda)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(3.0)
        teacher[0].fill_(1.0)
        out = gather_tokens(x, plan, backend="native")
        ema_update_(teacher, [torch.full_like(teacher[0], 2.0)], 0.5, backend="native")
        masks = random_mask(torch.arange(64, device=cuda), 16, 196, prob=0.8, backend="native")
    stream.synchronize()
    assert (out == 3.0).all() and (teacher[0] == 1.5).all()
    assert torch.equal(masks.ids_keep, plan.ids_keep)


def test_the_device_of_the_tensors_counts(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1 - (cuda.index or 0))
    teacher, student = [torch.zeros(1000, device=other)], [torch.ones(1000, device=other)]
    ema_update_(teacher, student, 0.5, backend="native")
    assert (teacher[0] == 0.5).all() and torch.cuda.current_device() == cuda.index


def test_graph_of_updates(cuda: torch.device) -> None:
    ours, eager = (Optimised(cuda, name, "fairseq", True) for name in ("native", "eager"))
    decay = torch.tensor(0.5, dtype=torch.float64, device=cuda)
    clip = torch.tensor(1.0, device=cuda)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in (ours, eager):
            run.optimizer.step(clip_factor=clip, ema_decay=decay)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.optimizer.step(clip_factor=clip, ema_decay=decay)
    for value in (0.5, 0.9):
        decay.fill_(value)
        clip.fill_(value)
        graph.replay()
        # eager may scale the gradients that it is given
        grads = [p.grad.clone() for p in eager.params if p.grad is not None]
        eager.optimizer.step(clip_factor=clip, ema_decay=decay)
        for p, g in zip(eager.params, grads, strict=True):
            p.grad = g
    for one, theirs in zip(ours.state(), eager.state(), strict=True):
        error = {FP32: 2e-6, FP16: 2e-3, BF16: 1.6e-2}[one.dtype]
        torch.testing.assert_close(one, theirs, rtol=error, atol=error)


def test_graph_of_masks_and_rows(cuda: torch.device) -> None:
    ids, seed = torch.arange(8, device=cuda), torch.tensor(1, device=cuda)
    x = torch.randn(8, 196, 768, device=cuda, requires_grad=True)

    def step() -> tuple[Tensor, ...]:
        plan = random_mask(ids, 4, 196, prob=0.8, seed=seed, backend="native")
        kept = gather_tokens(x, plan, backend="native")
        out = scatter_tokens(kept, plan, 0.1, seed, backend="native")
        return plan.ids_keep, out, torch.autograd.grad(out.square().sum(), x)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = []
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        for replayed, expected in zip(captured, step(), strict=True):
            assert_bitwise_equal(replayed, expected)
        seen.append(captured[0].clone())
    assert not torch.equal(*seen)


FAULTS: dict[str, tuple[Callable[[torch.device], object], str]] = {
    "seed on another device": (
        lambda device: torch.ops.d2vkern_native.scatter_fwd(
            torch.zeros(1, 1, 8, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device), 0, 0.1,
            torch.tensor(1), [0, 0]
        ),
        "scatter: seed must be",
    ),
    "slot of another dtype": (
        lambda device: torch.ops.d2vkern_native.scatter_fwd(
            torch.zeros(1, 1, 8, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device), 0, 0.1,
            None, [0, 0]
        ),
        "scatter: slot must be a 2-dim int32",
    ),
    "fp64": (
        lambda device: torch.ops.d2vkern_native.scatter_fwd(
            torch.zeros(1, 1, 8, device=device, dtype=torch.float64),
            torch.zeros(1, 1, dtype=torch.int32, device=device), 0, 0.1, None, [0, 0]
        ),
        "scatter: x must be fp32, fp16 or bf16",
    ),
    "kinds that are no codes": (
        lambda device: torch.ops.d2vkern_native.ema_update_chunks_(
            torch.zeros(6, dtype=torch.int64, device=device), 0, 8192, [1, 9, 0], 0.5, None
        ),
        "ema: kinds must be codes 0 to 3, got 9",
    ),
    "a teacher in 16 bits": (
        lambda device: torch.ops.d2vkern_native.ema_update_chunks_(
            torch.zeros(6, dtype=torch.int64, device=device), 0, 8192, [3, 3, 0], 0.5, None
        ),
        "ema: column 0 of the table must be fp32 on CUDA, got code 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_kernels_cannot_take_is_refused(
    cuda: torch.device, fault: tuple[Callable[[torch.device], object], str]
) -> None:
    call, words = fault
    with pytest.raises(RuntimeError, match=words):
        call(cuda)
