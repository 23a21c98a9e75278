"""Run with the Python of an environment that a wheel was installed into (make wheel-matrix).

The extension must be in use, and each of its ops must agree with eager, uncompiled and under torch.compile.
"""

import torch

import d2vkern
from d2vkern import _native, info
from d2vkern.testing import backend_spy


def results(backend: str) -> list[torch.Tensor]:
    """One call of every op, on CPU tensors."""
    torch.manual_seed(0)
    plan = d2vkern.inverse_block_mask(
        torch.arange(4), 3, (14, 14), prob=0.8, length=3, seed=5, backend=backend
    )
    x = torch.randn(4, 196, 24, requires_grad=True)
    kept = d2vkern.gather_tokens(x, plan, torch.zeros(1, 24), backend=backend)
    out = d2vkern.scatter_tokens(kept, plan, 0.1, 3, backend=backend)
    out.square().sum().backward()
    weight = torch.nn.Parameter(torch.randn(50, 7))
    teacher, low = weight.detach().clone(), torch.zeros(50, 7, dtype=torch.bfloat16)
    optimizer = d2vkern.AdamWEMA([weight], 0.1, teacher=[teacher], copies=[low], backend=backend)
    for _ in range(3):
        weight.grad = torch.randn(50, 7)
        optimizer.step(ema_decay=0.9)
    average = [torch.randn(33)]
    d2vkern.ema_update_(average, [torch.randn(33).half()], 0.99, backend=backend)
    return [plan.mask, plan.slot, out.detach(), x.grad, weight.detach(), teacher, low, *average]


def main() -> None:
    print(info.render(info.collect()))
    assert not _native.problem(), _native.problem()
    with backend_spy() as calls:
        ours = results("native")
    assert {stem for stem, backend in calls if backend == "native"} == {"masks", "gather", "ema", "adamw_ema"}
    for actual, expected in zip(ours, results("eager"), strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-5, atol=1e-6 if actual.dtype != torch.bfloat16 else 1e-2
        )
    teacher, twin, student = torch.zeros(9), torch.zeros(9), torch.ones(9)
    update = torch.compile(
        lambda t: d2vkern.ema_update_([t], [student], 0.5, backend="native"),
        fullgraph=True,
        backend="aot_eager",
    )
    update(teacher)
    d2vkern.ema_update_([twin], [student], 0.5, backend="eager")
    assert torch.equal(teacher, twin)
    print(f"native agrees with eager on torch {torch.__version__}")


if __name__ == "__main__":
    main()
