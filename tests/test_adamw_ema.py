"""AdamWEMA: against torch.optim.AdamW, against fairseq's formula, teacher and copies, refusals."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from d2vkern import use_backend
from d2vkern.ops.adamw_ema import AdamWEMA
from d2vkern.testing import assert_bitwise_equal, backend_spy


@pytest.fixture(autouse=True)
def on_eager() -> Iterator[None]:
    """Not the compiled extension, which auto prefers where it is built."""
    with use_backend("eager"):
        yield


SHAPES = [(4, 3), (5,), (1, 1, 2, 1, 1), (0, 2), (33, 17)]
BETAS = (0.9, 0.98)


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def set_grads(params: list[nn.Parameter], step: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = size * torch.randn(p.shape, dtype=p.dtype, generator=generator)


def clones(tensors: list[nn.Parameter]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


class FairseqAdam:
    """fairseq/optim/adam.py `Adam.step`, written out in fp64 for one parameter."""

    def __init__(self, p: Tensor, lr: float, eps: float, weight_decay: float) -> None:
        self.p, self.m, self.v, self.t = p.detach().double().clone(), 0.0, 0.0, 0
        self.lr, self.eps, self.weight_decay = lr, eps, weight_decay

    def step(self, grad: Tensor) -> None:
        g = grad.double()
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g * g
        step_size = self.lr * (1 - BETAS[1] ** self.t) ** 0.5 / (1 - BETAS[0] ** self.t)
        self.p = self.p - self.lr * self.weight_decay * self.p
        self.p = self.p - step_size * self.m / (self.v.sqrt() + self.eps)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-6], ids=["large gradients", "gradients near eps"])
def test_fairseq_formula(size: float, capturable: bool) -> None:
    params = make_params()
    oracles = [FairseqAdam(p, 0.01, 1e-6, 0.1) for p in params]
    optimizer = AdamWEMA(
        params, 0.01, BETAS, 1e-6, 0.1, eps_mode="fairseq", capturable=capturable, teacher=clones(params)
    )
    for step in range(5):
        set_grads(params, step, size)
        for p, oracle in zip(params, oracles, strict=True):
            oracle.step(p.grad)
        optimizer.step()
        for p, oracle in zip(params, oracles, strict=True):
            torch.testing.assert_close(p.detach().double(), oracle.p, rtol=1e-5, atol=1e-6)


def test_the_eps_modes_differ_when_gradients_are_near_eps() -> None:
    moved = {}
    for mode in ("torch", "fairseq"):
        p = nn.Parameter(torch.zeros(3))
        p.grad = torch.full((3,), 1e-6)
        AdamWEMA([p], 1.0, BETAS, 1e-6, 0.0, eps_mode=mode).step()
        moved[mode] = -p[0].item()
    # m / bc1 = 1e-6 and sqrt(v / bc2) = 1e-6; fairseq's eps weighs 1 / sqrt(bc2) = 7.07 times as much.
    assert moved["torch"] == pytest.approx(1 / 2, rel=1e-4)
    assert moved["fairseq"] == pytest.approx(1 / (1 + 50**0.5), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("capturable", [False, True])
def test_matches_torch_adamw(capturable: bool, dtype: torch.dtype) -> None:
    ours, theirs = make_params(dtype), make_params(dtype)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    optimizer = AdamWEMA(ours, 0.01, BETAS, 1e-6, 0.1, capturable=capturable)
    oracle = torch.optim.AdamW(theirs, 0.01, BETAS, 1e-6, 0.1)
    for step in range(5):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_capturable_takes_a_tensor_learning_rate() -> None:
    ours, theirs = [nn.Parameter(torch.ones(3))], [nn.Parameter(torch.ones(3))]
    lr = torch.tensor(0.0)
    optimizer, oracle = AdamWEMA(ours, lr, capturable=True), torch.optim.AdamW(theirs, 0.25)
    lr.fill_(0.25)
    set_grads(ours, 0)
    set_grads(theirs, 0)
    optimizer.step()
    oracle.step()
    torch.testing.assert_close(ours[0], theirs[0])


def test_state_dict_goes_to_torch_and_back() -> None:
    ours, theirs = make_params(), make_params()
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    optimizer = AdamWEMA(ours, 0.01, BETAS, 1e-6, 0.1)
    for step in range(2):
        set_grads(ours, step)
        optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    oracle = torch.optim.AdamW(theirs)
    oracle.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    back = AdamWEMA(ours, eps_mode="torch")
    back.load_state_dict(copy.deepcopy(oracle.state_dict()))
    set_grads(ours, 7)
    set_grads(theirs, 7)
    back.step()
    oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert back.state[p]["step"] == 3


def test_resuming_from_its_own_state_is_bitwise() -> None:
    params = make_params()
    optimizer = AdamWEMA(params, 0.01, eps_mode="fairseq")
    set_grads(params, 0)
    optimizer.step()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = AdamWEMA(twins, 1.0, eps_mode="torch")
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.param_groups[0]["eps_mode"] == "fairseq" and twin.param_groups[0]["lr"] == 0.01
    for some, opt in ((params, optimizer), (twins, twin)):
        set_grads(some, 1)
        opt.step()
    for p, q in zip(params, twins, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_clip_factor_scales_the_gradients(as_tensor: bool, capturable: bool) -> None:
    ours, theirs = make_params(), make_params()
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    optimizer = AdamWEMA(ours, 0.01, eps=1e-2, capturable=capturable)
    oracle = torch.optim.AdamW(theirs, 0.01, eps=1e-2)
    for step, factor in enumerate((0.3, 1.0, 1e-3)):
        set_grads(ours, step)
        set_grads(theirs, step)
        for q in theirs:
            q.grad.mul_(factor)
        optimizer.step(clip_factor=torch.tensor(factor) if as_tensor else factor)
        oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["list", "mapping"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_teacher_follows_the_updated_parameters(as_tensor: bool, form: str) -> None:
    params = make_params()
    teachers = clones(params)
    before = [t.double() for t in teachers]
    attached = teachers if form == "list" else dict(zip(params, teachers, strict=True))
    optimizer = AdamWEMA(params, 0.1, teacher=attached)
    set_grads(params, 0)
    optimizer.step(ema_decay=torch.tensor(0.9, dtype=torch.float64) if as_tensor else 0.9)
    for t, old, p in zip(teachers, before, params, strict=True):
        torch.testing.assert_close(t.double(), 0.9 * old + 0.1 * p.detach().double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decay", [None, 1.0, 1])
def test_without_decay_teachers_stay(decay: float | None) -> None:
    params = make_params()
    start, teachers = clones(params), clones(params)
    set_grads(params, 0)
    AdamWEMA(params, 0.1, teacher=teachers).step(ema_decay=decay)
    assert not torch.equal(start[0], params[0])
    for t, before in zip(teachers, start, strict=True):
        assert_bitwise_equal(t, before)


def test_parameters_without_gradient_stay_but_their_teachers_move() -> None:
    skipped, trained, outside = (nn.Parameter(torch.randn(3)) for _ in range(3))
    frozen = nn.Parameter(torch.randn(3), requires_grad=False)
    everything = [skipped, trained, frozen, outside]
    start = clones(everything)
    teachers = [torch.zeros(3) for _ in everything]
    low = torch.zeros(3, dtype=torch.bfloat16)
    optimizer = AdamWEMA(
        [skipped, trained, frozen],
        0.1,
        teacher=dict(zip(everything, teachers, strict=True)),
        teacher_copies={frozen: low},
    )
    trained.grad = torch.randn(3)
    optimizer.step(ema_decay=0.75)
    for i in (0, 2, 3):
        assert torch.equal(everything[i], start[i])
    torch.testing.assert_close(teachers[0], 0.25 * start[0])
    torch.testing.assert_close(teachers[1], 0.25 * trained.detach())
    assert torch.equal(teachers[2], frozen) and torch.equal(low, frozen.bfloat16())
    torch.testing.assert_close(teachers[3], 0.25 * start[3])
    assert set(optimizer.state) == {trained}


def test_a_parameter_that_skipped_a_step_keeps_its_own_count() -> None:
    ours, theirs = make_params(), make_params()
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    optimizer, oracle = AdamWEMA(ours, 0.01), torch.optim.AdamW(theirs, 0.01)
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        if step == 0:
            ours[1].grad = theirs[1].grad = None
        optimizer.step()
        oracle.step()
    assert optimizer.state[ours[1]]["step"] == 2 and optimizer.state[ours[0]]["step"] == 3
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_copies_receive_the_rounded_parameters_and_teachers() -> None:
    params = make_params()
    teachers = clones(params)
    low = [torch.zeros_like(t, dtype=torch.bfloat16) for t in teachers]
    teacher_low = [torch.zeros_like(t, dtype=torch.float16) for t in teachers]
    set_grads(params, 0)
    AdamWEMA(params, 0.1, teacher=teachers, copies=low, teacher_copies=teacher_low).step(ema_decay=0.5)
    for p, t, c, d in zip(params, teachers, low, teacher_low, strict=True):
        assert_bitwise_equal(c, p.detach().bfloat16())
        assert_bitwise_equal(d, t.half())


def test_groups_have_their_own_decay_and_learning_rate() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    first.grad, second.grad = torch.zeros(2), torch.zeros(2)
    AdamWEMA(
        [{"params": [first], "weight_decay": 0.5}, {"params": [second], "lr": 0.2}], 0.1, weight_decay=0.0
    ).step()
    assert torch.equal(first, torch.full((2,), 0.95)) and torch.equal(second, torch.ones(2))


def test_repeats_bitwise() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(3)
        params = make_params()
        teachers = clones(params)
        optimizer = AdamWEMA(params, 0.01, eps_mode="fairseq", teacher=teachers)
        for step in range(3):
            set_grads(params, step)
            optimizer.step(clip_factor=torch.tensor(0.7), ema_decay=0.9)
        return [*params, *teachers]

    for first, second in zip(run(), run(), strict=True):
        assert_bitwise_equal(first.detach(), second.detach())


def test_converges_on_least_squares_and_returns_the_closure() -> None:
    x, true = torch.randn(64, 4), torch.tensor([1.0, -2.0, 0.5, 3.0])
    w = nn.Parameter(torch.zeros(4))
    teacher = [torch.zeros(4)]
    optimizer = AdamWEMA([w], 0.05, weight_decay=0.0, teacher=teacher)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x @ (w - true)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure, ema_decay=0.9) for _ in range(300)]
    assert losses[-1].item() < 1e-4 < losses[0].item()
    torch.testing.assert_close(teacher[0], true, rtol=0, atol=0.02)


def test_one_call_per_group_through_the_backend_choice() -> None:
    params = make_params()
    set_grads(params, 0)
    optimizer = AdamWEMA(params, 0.1, teacher=clones(params), backend="eager")
    with backend_spy() as calls:
        optimizer.step(ema_decay=0.9)
    assert calls == [("adamw_ema", "eager")]


def test_refusals() -> None:
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="adamw_ema: params must have dtype float32 or float64, got bfloat16"):
        AdamWEMA([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match="adamw_ema: eps_mode must be one of 'torch', 'fairseq', got 'apex'"):
        AdamWEMA([p], eps_mode="apex")
    with pytest.raises(ValueError, match="adamw_ema: beta2 must be >= 0.0 and < 1.0, got 1.0"):
        AdamWEMA([p], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="adamw_ema: lr must be >= 0.0, got -1"):
        AdamWEMA([p], lr=-1)
    with pytest.raises(ValueError, match="adamw_ema: lr must be a float unless capturable"):
        AdamWEMA([p], lr=torch.tensor(0.1))
    with pytest.raises(ValueError, match="adamw_ema: teacher must have 1 entries like params, got 2"):
        AdamWEMA([p], teacher=[None, None])
    with pytest.raises(
        ValueError, match=r"adamw_ema: teacher\[0\] must have shape \(2,\) like params\[0\], got \(3,\)"
    ):
        AdamWEMA([p], teacher=[torch.zeros(3)])
    with pytest.raises(
        ValueError, match="adamw_ema: teacher_copies must belong to teachers, got 1 without one"
    ):
        AdamWEMA([p], teacher_copies=[torch.zeros(2)])
    with pytest.raises(
        ValueError, match=r"adamw_ema: copies\[0\] must have shape \(2,\) like params\[0\], got \(3,\)"
    ):
        AdamWEMA([p], copies=[torch.zeros(3)])
    optimizer = AdamWEMA([p])
    with pytest.raises(ValueError, match="adamw_ema: ema_decay must be >= 0.0 and <= 1.0, got 1.5"):
        optimizer.step(ema_decay=1.5)
    p.grad = torch.sparse_coo_tensor(
        torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (2,), check_invariants=True
    )
    with pytest.raises(ValueError, match="adamw_ema: gradients must be dense, got a sparse one"):
        optimizer.step()
    with pytest.raises(ValueError, match="adamw_ema: amsgrad must be False, got True in the loaded state"):
        optimizer.load_state_dict(torch.optim.AdamW([p], amsgrad=True).state_dict())


@pytest.mark.parametrize("eps_mode", ["torch", "fairseq"])
def test_capturable_equals_host_steps(eps_mode: str) -> None:
    weights = []
    for capturable in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size)) for size in (5, 3)]
        teachers = [p.detach().clone() for p in params]
        lr = torch.tensor(0.03) if capturable else 0.03
        optimizer = AdamWEMA(
            params, lr, eps=1e-3, eps_mode=eps_mode, teacher=teachers, capturable=capturable, weight_decay=0.1
        )
        for step in range(5):
            for number, p in enumerate(params):
                # the second parameter has no gradient in step 1 and so counts one step fewer
                p.grad = None if step == 1 and number else torch.randn(p.shape)
            optimizer.step(clip_factor=0.7, ema_decay=torch.tensor(0.9) if capturable else 0.9)
        assert [float(optimizer.state[p]["step"]) for p in params] == [5, 4]
        weights.append([*(p.detach() for p in params), *teachers])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("eps_mode", ["torch", "fairseq"])
def test_found_inf_leaves_everything_as_it_was(eps_mode: str) -> None:
    def run(found: list[float]) -> list[Tensor]:
        torch.manual_seed(0)
        weight, frozen = torch.nn.Parameter(torch.randn(5)), torch.randn(3)
        teachers = {weight: weight.detach().clone(), frozen: torch.zeros(3)}
        low, low_teacher = torch.zeros(5, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.bfloat16)
        optimizer = AdamWEMA(
            [weight], 0.1, eps_mode=eps_mode, teacher=teachers, capturable=True,
            copies={weight: low}, teacher_copies={weight: low_teacher},
        )  # fmt: skip
        for value in found:
            weight.grad = torch.full((5,), float("nan")) if value else torch.randn(5)
            clip = torch.tensor(float("nan") if value else 0.5)
            optimizer.step(clip_factor=clip, ema_decay=0.9, found_inf=torch.tensor(value))
        state = optimizer.state[weight]
        return [weight.detach(), teachers[weight], low, low_teacher, *state.values()]

    for ours, theirs in zip(run([1.0, 0.0, 1.0, 0.0, 1.0]), run([0.0, 0.0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_found_inf_needs_capturable() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match="adamw_ema: found_inf must be None unless capturable"):
        AdamWEMA([weight]).step(found_inf=torch.tensor(0.0))
    optimizer = AdamWEMA([weight], capturable=True)
    with pytest.raises(TypeError, match="adamw_ema: found_inf must have dtype float32"):
        optimizer.step(found_inf=torch.tensor(False))
    with pytest.raises(ValueError, match=r"adamw_ema: found_inf must have shape \(\), got \(1,\)"):
        optimizer.step(found_inf=torch.zeros(1))
    assert torch.equal(weight.detach(), torch.ones(2))


def test_compiled_capturable_steps_are_compiled_once_state_exists() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamWEMA([weight], teacher=[torch.ones(2)], capturable=True)
    graphs = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    step = torch.compile(lambda: optimizer.step(ema_decay=0.5), fullgraph=True, backend=count)
    weight.grad = torch.ones(2)
    for _ in range(5):
        step()
    assert len(graphs) <= 2
    torch._dynamo.reset()


def test_gradients_of_other_strides_are_read_by_their_strides() -> None:
    weights = []
    for transposed in (False, True):
        weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        grad = torch.linspace(-1, 1, 12).view(3, 4)
        weight.grad = grad.t().contiguous().t() if transposed else grad
        AdamWEMA([weight], lr=0.1).step(clip_factor=0.5)
        weights.append(weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_found_inf_keeps_the_digits_of_the_decay() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.zeros(1)
    teacher = torch.zeros(1)
    optimizer = AdamWEMA([weight], lr=0.0, teacher=[teacher], capturable=True)
    optimizer.step(ema_decay=0.99999, found_inf=torch.tensor(0.0))
    assert teacher.item() == pytest.approx(1e-5, rel=1e-6)
