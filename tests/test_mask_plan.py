"""MaskPlan: made of anyone's masks and indices, moved, indexed, joined, traced; what it refuses."""

import copy
import dataclasses
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from d2vkern import (
    MaskPlan,
    gather_tokens,
    masked_regression_loss,
    random_mask,
    scatter_tokens,
    use_backend,
)
from d2vkern.testing import assert_bitwise_equal


def test_from_mask_takes_any_mask():
    mask = torch.tensor([[0, 1, 1, 0], [2, 0, 0, -1]], dtype=torch.int8)
    lengths = torch.tensor([4, 3], dtype=torch.int32)
    plan = MaskPlan.from_mask(mask, 2, lengths)
    assert plan.ids_keep.tolist() == [[0, 3], [1, 2]] and plan.ids_mask.tolist() == [[1, 2], [0, 3]]
    assert plan.slot.tolist() == [[0, -1, -1, 1], [-1, 0, 1, -1]]
    assert plan.lengths is lengths and plan.samples == 1
    strided = torch.zeros(2, 8, dtype=torch.bool)[:, ::2]
    assert MaskPlan.from_mask(strided, 1).kept == 4
    assert MaskPlan.from_mask(~strided, 1).kept == 0
    assert MaskPlan.from_mask(torch.zeros(0, 4).bool(), 3).samples == 0


def test_from_mask_names_the_first_differing_row():
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[:, :5] = True
    mask[3, 4] = False
    with pytest.raises(ValueError, match="row 3 keeps 5 tokens, row 0 keeps 4"):
        MaskPlan.from_mask(mask, 2)


def test_plan_is_frozen_and_moves():
    plan = random_mask(torch.arange(2), 2, 8, prob=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.clones = 3
    assert plan.to("cpu") is plan
    padded = dataclasses.replace(plan, lengths=torch.full((4,), 8, dtype=torch.int32)).to("meta")
    assert {tensor.device.type for tensor in (padded.mask, padded.ids_keep, padded.slot, padded.lengths)} == {
        "meta"
    }
    assert padded.clones == 2


ONE = torch.zeros(1, 4, dtype=torch.bool)
INT32 = {"dtype": torch.int32}
NAMES = ("mask", "ids_keep", "slot", "lengths", "kept_lengths", "padded_ids_mask")
_PADDED = MaskPlan.from_mask(ONE, 1, pad=True)
PLAN_ERRORS = {
    "complex mask": (
        lambda: MaskPlan.from_mask(ONE.cfloat(), 1),
        TypeError,
        "mask must be bool, integer or floating, got torch.complex64",
    ),
    "float mask": (
        lambda: MaskPlan.from_mask(torch.tensor([[0.0, 1.0, 0.25, float("nan")]]), 1),
        ValueError,
        "a floating mask must hold 0 and 1 alone, got 0.25",
    ),
    "order": (
        lambda: MaskPlan.from_mask(ONE, 1, order="row"),
        ValueError,
        "order must be one of 'sample', 'mask'",
    ),
    "index outside": (
        lambda: MaskPlan.from_ids_keep(torch.tensor([[0, 1], [2, 4]]), 4),
        ValueError,
        "ids_keep must be >= 0 and < 4, got 4 in row 1",
    ),
    "negative index": (
        lambda: MaskPlan.from_ids_keep(torch.tensor([[0, -2]]), 4, pad=True),
        ValueError,
        "ids_keep must be >= 0 and < 4, got -2 in row 0",
    ),
    "index twice": (
        lambda: MaskPlan.from_ids_keep(torch.tensor([[3, 1], [2, 2]]), 4),
        ValueError,
        "ids_keep must be distinct within a row, got 2 in row 1",
    ),
    "index dtype": (
        lambda: MaskPlan.from_ids_keep(torch.zeros(1, 1), 4),
        TypeError,
        "ids_keep must have dtype int32 or int64, got float32",
    ),
    "unequal indices": (
        lambda: MaskPlan.from_ids_keep([torch.tensor([[0, 1]]), torch.tensor([[2]])], 4),
        ValueError,
        "row 1 keeps 1 tokens, row 0 keeps 2",
    ),
    "lists and clones": (
        lambda: MaskPlan.from_ids_keep([torch.tensor([[0, 1]])], 4, clones=2),
        ValueError,
        "ids_keep must hold clones = 2 tensors, got 1",
    ),
    "unchecked padding": (
        lambda: MaskPlan.from_ids_keep(torch.tensor([[0, -1]]), 4, pad=True, check=False),
        ValueError,
        "check must be True with pad",
    ),
    "half padded": (
        lambda: MaskPlan(*(getattr(_PADDED, name) for name in NAMES[:3]), 1, None, _PADDED.kept_lengths),
        ValueError,
        "kept_lengths and padded_ids_mask must be given together",
    ),
    "padded shape": (
        lambda: dataclasses.replace(_PADDED, padded_ids_mask=torch.zeros(2, 3, **INT32)),
        ValueError,
        r"padded_ids_mask must have shape \(1, P\)",
    ),
    "nothing to collate": (lambda: MaskPlan.collate([]), ValueError, "plans must be at least one, got none"),
    "collate tokens": (
        lambda: MaskPlan.collate([MaskPlan.from_mask(ONE, 1), MaskPlan.from_mask(ONE[:, 1:], 1)]),
        ValueError,
        "plans must have equally many tokens, got 4 and 3",
    ),
    "mask rank": (
        lambda: MaskPlan.from_mask(ONE[0], 1),
        ValueError,
        r"mask must have shape \(N, T\), got \(4,\)",
    ),
    "clones": (lambda: MaskPlan.from_mask(ONE, 2), ValueError, "multiple of clones = 2 rows, got 1"),
    "no clones": (lambda: MaskPlan.from_mask(ONE, 0), ValueError, "clones must be >= 1, got 0"),
    "no tokens": (lambda: MaskPlan.from_mask(ONE[:, :0], 1), ValueError, "tokens T must be >= 1, got 0"),
    "lengths shape": (
        lambda: MaskPlan.from_mask(ONE, 1, torch.ones(2, **INT32)),
        ValueError,
        r"lengths must have shape \(1,\)",
    ),
    "lengths dtype": (
        lambda: MaskPlan.from_mask(ONE, 1, torch.ones(1).long()),
        TypeError,
        "lengths must have dtype int32, got int64",
    ),
    "ids dtype": (
        lambda: MaskPlan(ONE, torch.zeros(1, 4).long(), torch.zeros(1, 4, **INT32), 1),
        TypeError,
        "ids_keep must have dtype int32",
    ),
    "ids rows": (
        lambda: MaskPlan(ONE, torch.zeros(2, 4, **INT32), torch.zeros(1, 4, **INT32), 1),
        ValueError,
        r"ids_keep must have shape \(1, K\)",
    ),
    "too many": (
        lambda: MaskPlan(ONE, torch.zeros(1, 5, **INT32), torch.zeros(1, 4, **INT32), 1),
        ValueError,
        "kept tokens K must be <= 4, got 5",
    ),
    "slot": (
        lambda: MaskPlan(ONE, torch.zeros(1, 4, **INT32), torch.zeros(1, 3, **INT32), 1),
        ValueError,
        r"slot must have shape \(1, 4\) like mask",
    ),
    "devices": (
        lambda: MaskPlan(ONE, torch.zeros(1, 4, **INT32, device="meta"), torch.zeros(1, 4, **INT32), 1),
        ValueError,
        "ids_keep must be on cpu like mask",
    ),
}


@pytest.mark.parametrize("case", PLAN_ERRORS)
def test_plan_errors(case):
    make, error, message = PLAN_ERRORS[case]
    with pytest.raises(error, match=message):
        make()


def assert_same(ours: MaskPlan, theirs: MaskPlan) -> None:
    assert ours.clones == theirs.clones
    for name in NAMES:
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert_bitwise_equal(one, other)


def padded(rows: int = 4, tokens: int = 6, clones: int = 2) -> MaskPlan:
    mask = torch.rand(rows, tokens).argsort(1) < torch.arange(1, rows + 1)[:, None]
    lengths = torch.arange(rows, dtype=torch.int32) + 2
    return MaskPlan.from_mask(mask, clones, lengths, pad=True)


def test_floats_of_0_and_1_are_masks() -> None:
    mask = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert_same(MaskPlan.from_mask(mask.to(dtype), 2), MaskPlan.from_mask(mask.bool(), 2))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_maes_indices(check: bool, dtype: torch.dtype) -> None:
    """As models_mae.py, random_masking, makes them: in random order, with the mask beside them."""
    N, T, K = 4, 12, 5
    shuffled = torch.rand(N, T).argsort(1)
    restore, ids_keep = shuffled.argsort(1), shuffled[:, :K]
    mask = torch.ones(N, T)
    mask[:, :K] = 0
    mask = mask.gather(1, restore)
    plan = MaskPlan.from_ids_keep(ids_keep.to(dtype), T, check=check)
    assert_same(plan, MaskPlan.from_mask(mask, 1))
    several = MaskPlan.from_ids_keep(ids_keep.to(dtype), T, clones=2, check=check)
    assert_same(several, MaskPlan.from_mask(mask, 2))
    traced = torch.compile(
        lambda x: MaskPlan.from_ids_keep(x, T, check=False).slot, fullgraph=True, backend="eager"
    )
    assert torch.equal(traced(ids_keep), plan.slot)


@pytest.mark.parametrize("pad", [False, True])
def test_ijepas_masks(pad: bool) -> None:
    """A list of index tensors, one for each version; all samples' first rows come first (apply_masks)."""
    B, T, D, sizes = 3, 10, 4, ((5, 3) if pad else (4, 4))
    masks = [torch.rand(B, T).argsort(1)[:, :size].sort(1).values for size in sizes]
    x = torch.randn(B, T, D)
    plan = MaskPlan.from_ids_keep(masks, T, pad=pad)
    assert (plan.clones, plan.samples) == (2, B)
    ours = plan.mask_major(gather_tokens(x, plan))
    for m, mask in enumerate(masks):
        theirs = x.gather(1, mask[..., None].expand(-1, -1, D))
        assert_bitwise_equal(ours[m * B : (m + 1) * B, : mask.shape[1]], theirs)
        assert (ours[m * B : (m + 1) * B, mask.shape[1] :] == 0).all()
    assert_bitwise_equal(plan.sample_major(ours), gather_tokens(x, plan))
    rows = plan.mask_major(plan.mask)
    lengths = torch.arange(2 * B, dtype=torch.int32)
    again = MaskPlan.from_mask(rows, 2, lengths, order="mask", pad=pad)
    assert_same(dataclasses.replace(again, lengths=None), plan)
    assert torch.equal(again.lengths, torch.tensor([0, 3, 1, 4, 2, 5], dtype=torch.int32))
    if not pad:
        together = torch.cat(masks)
        for check in (True, False):
            assert_same(MaskPlan.from_ids_keep(together, T, 2, order="mask", check=check), plan)


def test_samples_of_a_plan() -> None:
    plan = padded(rows=6)
    rows = torch.arange(6).view(3, 2)
    for index in (
        1,
        -1,
        slice(1, 3),
        slice(0, 0),
        [2, 0],
        torch.tensor([2, 2, 0]),
        torch.tensor([True, False, True]),
    ):
        some = plan[index]
        expected = rows[index].reshape(-1)
        for name in NAMES:
            assert torch.equal(getattr(some, name), getattr(plan, name)[expected])
        assert some.samples == len(expected) // 2
    assert [one.samples for one in plan] == [1, 1, 1]
    with pytest.raises(IndexError):
        plan[3]


def test_plans_are_joined() -> None:
    whole = padded(rows=6)
    assert_same(MaskPlan.collate([whole[:1], whole[1:]]), whole)
    equal = random_mask(torch.arange(4), 2, 6, prob=0.5)
    assert_same(MaskPlan.collate(list(equal)), equal)
    masks = [torch.zeros(2, 6, dtype=torch.bool) for _ in range(3)]
    for count, mask in enumerate(masks, 1):
        mask[:, :count] = True
    lengths = torch.tensor([4, 5], dtype=torch.int32)
    plans = [MaskPlan.from_mask(mask, 2, lengths if i == 1 else None) for i, mask in enumerate(masks)]
    joined = MaskPlan.collate(plans)
    expected = MaskPlan.from_mask(
        torch.cat(masks), 2, torch.tensor([6, 6, 4, 5, 6, 6], dtype=torch.int32), pad=True
    )
    assert_same(joined, expected)
    loader = DataLoader([whole[0], whole[1], whole[2]], batch_size=3, collate_fn=MaskPlan.collate)
    assert_same(next(iter(loader)), whole)


def test_plans_move_and_are_copied() -> None:
    plan = padded()
    assert plan.to("cpu", non_blocking=True) is plan
    assert {getattr(plan.to("meta"), name).device.type for name in NAMES} == {"meta"}
    buffer = io.BytesIO()
    torch.save(plan, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(plan), torch.load(buffer)):
        assert_same(other, plan)
        assert other.mask is not plan.mask


@pytest.mark.gpu
def test_plans_are_pinned() -> None:
    loader = DataLoader(
        [padded()[0], padded()[1]], batch_size=2, collate_fn=MaskPlan.collate, pin_memory=True
    )
    pinned = next(iter(loader))
    assert all(getattr(pinned, name).is_pinned() for name in NAMES)
    moved = pinned.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert_same(moved.to("cpu"), pinned)


def test_a_plan_is_a_pytree() -> None:
    plan, plain = padded(), random_mask(torch.arange(2), 2, 8, prob=0.5)
    for one, tensors in ((plan, 6), (plain, 3)):
        leaves, spec = pytree.tree_flatten({"plan": one})
        assert sum(leaf is not None for leaf in leaves) == tensors
        assert_same(pytree.tree_unflatten(leaves, spec)["plan"], one)
        names = [str(path) for path, leaf in pytree.tree_flatten_with_path(one)[0] if leaf is not None]
        assert "mask" in names[0]
        assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    moved = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), plan)
    assert moved.mask.is_meta and moved.clones == 2


class Walk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, plan: MaskPlan) -> Tensor:
        with use_backend("eager"):
            kept = gather_tokens(x, plan)
            placed = scatter_tokens(kept * 2, plan, mask_token=self.token)
            return masked_regression_loss(placed, x, plan).loss


@pytest.mark.parametrize("pad", [False, True])
def test_plans_are_inputs_of_exported_and_compiled_models(pad: bool) -> None:
    model, x = Walk(), torch.randn(2, 6, 4)

    def plan_of(seed: int) -> MaskPlan:
        plan = random_mask(torch.arange(2), 2, 6, prob=0.5, seed=seed)
        return MaskPlan.from_mask(plan.mask, 2, pad=pad)

    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for seed in (1, 2):
            torch.testing.assert_close(compiled(x, plan_of(seed)), model(x, plan_of(seed)))
        if not pad:
            return
        program = torch.export.export(model, (x, plan_of(1)))
        torch.testing.assert_close(program.module()(x, plan_of(2)), model(x, plan_of(2)))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    torch.testing.assert_close(loaded(x, plan_of(3)), model(x, plan_of(3)).detach())
