"""Masks: the bits against a slow spelling of the definition, exact counts, errors.

The distributions are compared with the original's in test_mask_statistics.py.
"""

import inspect
from collections.abc import Iterator

import pytest
import torch

from d2vkern import use_backend
from d2vkern.ops.masks import MaskPlan, inverse_block_mask, random_mask, span_mask
from d2vkern.reference import masks as reference
from d2vkern.reference.philox import CENTRES, PRIORITIES, row_draws


@pytest.fixture(autouse=True)
def on_eager() -> Iterator[None]:
    """Not the compiled extension, which auto prefers where it is built."""
    with use_backend("eager"):
        yield


IMAGE = {"prob": 0.8, "length": 3, "adjust": 0.07}
AUDIO = {"prob": 0.5, "length": 5, "adjust": 0.05}


def slow_cells(union, tokens, target, sample, clone, seed, epoch):
    """The equalised cells of one row, by sorting (unmarked, priority, cell)."""
    words = row_draws(torch.tensor([sample]), clone + 1, tokens, PRIORITIES, seed=seed, epoch=epoch)[
        clone
    ].tolist()
    return set(sorted(range(tokens), key=lambda cell: (cell not in union, words[cell], cell))[:target])


def slow_centres(tokens, count, sample, clone, seed, epoch):
    words = row_draws(torch.tensor([sample]), clone + 1, count, CENTRES, seed=seed, epoch=epoch)[
        clone
    ].tolist()
    return [word * tokens >> 32 for word in words]


def slow_inverse_block(sample, clone, grid, prob, length, adjust, seed, epoch):
    height, width = grid
    tokens, visible = height * width, 1 - prob
    union = set()
    for centre in slow_centres(
        tokens, int(tokens * ((visible + adjust) / length**2)), sample, clone, seed, epoch
    ):
        row, col = divmod(centre, width)
        for r in range(row - length // 2, row - length // 2 + length):
            for c in range(col - length // 2, col - length // 2 + length):
                if 0 <= r < height and 0 <= c < width:
                    union.add(r * width + c)
    kept = slow_cells(union, tokens, int(tokens * visible), sample, clone, seed, epoch)
    return [cell not in kept for cell in range(tokens)]


def slow_span(sample, clone, tokens, prob, length, adjust, seed, epoch):
    union = set()
    for centre in slow_centres(tokens, int(tokens * ((prob + adjust) / length)), sample, clone, seed, epoch):
        start = centre - length // 2
        union |= {cell for cell in range(start, start + length) if 0 <= cell < tokens}
    masked = slow_cells(union, tokens, int(tokens * prob), sample, clone, seed, epoch)
    return [cell in masked for cell in range(tokens)]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("grid", [(14, 14), (5, 9), (1, 12), (7, 2)])
def test_inverse_block_is_its_definition(grid, length):
    ids = torch.tensor([3, -1, 2**40])
    settings = {"prob": 0.7, "length": length, "adjust": 0.1, "seed": 11, "epoch": 2}
    plan = inverse_block_mask(ids, 2, grid, **settings)
    expected = [slow_inverse_block(b, m, grid, **settings) for b in ids.tolist() for m in range(2)]
    assert plan.mask.tolist() == expected


@pytest.mark.parametrize("length", [1, 4, 5, 100])
@pytest.mark.parametrize("tokens", [2, 10, 77])
def test_span_is_its_definition(tokens, length):
    ids = torch.tensor([3, -1, 2**40])
    settings = {"prob": 0.5, "length": length, "adjust": 0.05, "seed": -11, "epoch": 2}
    plan = span_mask(ids, 3, tokens, **settings)
    assert plan.mask.tolist() == [slow_span(b, m, tokens, **settings) for b in ids.tolist() for m in range(3)]


def test_random_mask_is_its_definition():
    plan = random_mask(torch.tensor([8, 9]), 2, 33, prob=0.48, seed=4, epoch=1)
    kept = [slow_cells(set(), 33, int(33 * (1 - 0.48)), b, m, 4, 1) for b in (8, 9) for m in range(2)]
    assert [set(row) for row in plan.ids_keep.tolist()] == kept


def test_ties_of_priority_go_to_the_smaller_position(monkeypatch):
    monkeypatch.setattr(
        reference, "row_draws", lambda ids, clones, draws, *_, **__: torch.full((2, draws), 9)
    )
    assert random_mask(torch.arange(2), 1, 6, prob=0.5).ids_keep.tolist() == [[0, 1, 2]] * 2


def test_bits_stay_as_they_were_released():
    """Changing these changes every user's masks."""
    ids = torch.tensor([12345678901])
    image = inverse_block_mask(ids, 1, (6, 6), **IMAGE, seed=7, epoch=3)
    audio = span_mask(ids, 1, 16, **AUDIO, seed=7, epoch=3)
    text = random_mask(ids, 1, 16, prob=0.48, seed=7, epoch=3)
    assert image.ids_keep.tolist() == [[6, 8, 12, 13, 14, 18, 19]]
    assert audio.ids_keep.tolist() == [[0, 1, 2, 3, 11, 13, 14, 15]]
    assert text.ids_keep.tolist() == [[3, 6, 8, 9, 10, 12, 13, 14]]


GENERATORS = {
    "image": lambda ids, clones, **more: inverse_block_mask(ids, clones, (14, 14), **IMAGE, **more),
    "audio": lambda ids, clones, **more: span_mask(ids, clones, 249, **AUDIO, **more),
    "text": lambda ids, clones, **more: random_mask(ids, clones, 128, prob=0.48, **more),
}


@pytest.fixture(params=GENERATORS)
def generate(request):
    return GENERATORS[request.param]


def test_a_row_depends_on_its_identity_only(generate):
    ids = torch.tensor([5, 900, 7, 2**33 + 7, 0, -4])
    whole = generate(ids, 8, seed=1, epoch=2).mask.view(6, 8, -1)
    shards = torch.cat([generate(part, 8, seed=1, epoch=2).mask for part in (ids[:1], ids[1:4], ids[4:])])
    assert torch.equal(shards.view(6, 8, -1), whole)  # batch size, number of processes
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(generate(ids[order], 8, seed=1, epoch=2).mask.view(6, 8, -1), whole[order])
    assert torch.equal(generate(ids, 3, seed=1, epoch=2).mask.view(6, 3, -1), whole[:, :3])  # M
    twice = generate(torch.tensor([900, 900]), 8, seed=1, epoch=2).mask.view(2, 8, -1)
    assert torch.equal(twice[0], twice[1]) and torch.equal(twice[0], whole[1])


def test_threads_change_no_bit(generate):
    threads = torch.get_num_threads()
    masks = []
    for count in (1, 2):
        torch.set_num_threads(count)
        masks.append(generate(torch.arange(300), 4).mask)
    torch.set_num_threads(threads)
    assert torch.equal(*masks)


def test_every_part_of_the_key_counts(generate):
    ids = torch.arange(4)
    base = generate(ids, 4)
    rows = [base.mask]
    for change in ({"seed": 1}, {"seed": 1 << 32}, {"seed": -1}, {"epoch": 1}, {"epoch": (1 << 32) - 1}):
        rows.append(generate(ids, 4, **change).mask)
    rows.append(generate(ids + (1 << 32), 4).mask)
    together = torch.cat(rows)
    assert together.unique(dim=0).shape[0] == together.shape[0]
    assert torch.equal(generate(ids, 4).mask, base.mask)


def assert_same_plan(actual, expected):
    for field in ("mask", "ids_keep", "slot"):
        assert torch.equal(getattr(actual, field), getattr(expected, field))


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 5])
@pytest.mark.parametrize("epoch", [0, 7, (1 << 32) - 1])
def test_seed_and_epoch_may_be_tensors(generate, seed, epoch):
    ids = torch.tensor([5, -4, 2**33])
    expected = generate(ids, 2, seed=seed, epoch=epoch)
    given = {"seed": torch.tensor(seed), "epoch": torch.tensor(epoch)}
    assert_same_plan(generate(ids, 2, **given), expected)
    assert_same_plan(generate(ids, 2, seed=seed, epoch=given["epoch"]), expected)
    assert (given["seed"], given["epoch"]) == (seed, epoch)


def test_of_an_epoch_tensor_the_low_word_counts(generate):
    expected = generate(torch.arange(3), 2, epoch=5)
    assert_same_plan(generate(torch.arange(3), 2, epoch=torch.tensor(2**32 + 5)), expected)
    assert_same_plan(generate(torch.arange(3), 2, epoch=torch.tensor(5 - 2**32)), expected)


def test_plans_are_consistent(generate):
    plan = generate(torch.arange(20), 4)
    masked = {196: 157, 249: 124, 128: 62}[plan.tokens]
    assert (plan.mask.sum(1) == masked).all() and plan.kept == plan.tokens - masked
    assert (plan.samples, plan.clones, plan.lengths) == (20, 4, None)
    for field, dtype in (("mask", torch.bool), ("ids_keep", torch.int32), ("slot", torch.int32)):
        assert getattr(plan, field).dtype == dtype and getattr(plan, field).is_contiguous()
    for row in range(plan.mask.shape[0]):
        kept = (~plan.mask[row]).nonzero()[:, 0]
        assert torch.equal(plan.ids_keep[row].long(), kept)
        assert torch.equal(plan.ids_mask[row].long(), plan.mask[row].nonzero()[:, 0])
        slot = torch.full((plan.tokens,), -1)
        slot[kept] = torch.arange(plan.kept)
        assert torch.equal(plan.slot[row].long(), slot)
    again = MaskPlan.from_mask(plan.mask, 4)
    assert torch.equal(again.ids_keep, plan.ids_keep) and torch.equal(again.slot, plan.slot)
    assert plan.ids_mask is plan.ids_mask and plan.ids_mask.dtype == torch.int32


def test_no_samples(generate):
    plan = generate(torch.zeros(0, dtype=torch.int64), 4)
    assert plan.samples == 0 and plan.ids_keep.shape == (0, plan.kept) and plan.ids_mask.shape[0] == 0


def test_smallest_and_unplaced():
    assert random_mask(torch.arange(3), 1, 2, prob=0.5).mask.sum(1).tolist() == [1, 1, 1]
    # No centre fits (int(9 * 0.3 / 9) = 0): all cells are chosen one by one.
    plan = inverse_block_mask(torch.arange(3), 2, (3, 3), prob=0.7, length=3)
    assert plan.kept == int(9 * (1 - 0.7)) and (plan.mask.sum(1) == 9 - plan.kept).all()


ARGUMENTS = {
    "ids dtype": ({"ids": torch.zeros(2)}, TypeError, "ids must have dtype int64, got float32"),
    "ids rank": ({"ids": torch.zeros(2, 1).long()}, ValueError, r"ids must have shape \(B,\), got \(2, 1\)"),
    "ids list": ({"ids": [1, 2]}, TypeError, "ids must be a tensor, got list"),
    "clones 0": ({"clones": 0}, ValueError, "clones must be >= 1"),
    "clones many": ({"clones": 4097}, ValueError, "<= 4096, got 4097"),
    "prob 0": ({"prob": 0.0}, ValueError, r"prob must be in \(0, 1\), got 0.0"),
    "prob 1": ({"prob": 1.0}, ValueError, r"prob must be in \(0, 1\), got 1.0"),
    "prob nan": ({"prob": float("nan")}, ValueError, r"prob must be in \(0, 1\), got nan"),
    "epoch": ({"epoch": -1}, ValueError, "epoch must be >= 0"),
    "epoch many": ({"epoch": 1 << 32}, ValueError, "epoch must be .* <= 4294967295, got 4294967296"),
    "epoch rank": (
        {"epoch": torch.tensor([1])},
        ValueError,
        r"epoch must have shape \(\), got \(1,\)",
    ),
    "epoch dtype": (
        {"epoch": torch.tensor(1, dtype=torch.int32)},
        TypeError,
        "epoch must have dtype int64, got int32",
    ),
    "epoch device": (
        {"epoch": torch.tensor(1, device="meta")},
        ValueError,
        "epoch must be on cpu like ids, got meta",
    ),
    "seed rank": ({"seed": torch.zeros(0).long()}, ValueError, r"seed must have shape \(\), got \(0,\)"),
    "seed dtype": ({"seed": torch.tensor(1.0)}, TypeError, "seed must have dtype int64, got float32"),
    "length": ({"length": 0}, ValueError, "length must be >= 1, got 0"),
    "adjust": ({"adjust": -0.1}, ValueError, "adjust must be >= 0.0"),
    "tokens": ({"tokens": 0, "grid": (0, 4)}, ValueError, "must be >= 1.*, got 0"),
    "too many tokens": ({"tokens": 1 << 20, "grid": (1 << 10, 1 << 10)}, ValueError, "tokens must be"),
    "nothing kept": ({"prob": 0.999}, ValueError, "tokens must be enough to keep at least one at prob 0.999"),
    "nothing masked": (
        {"prob": 0.001},
        ValueError,
        "tokens must be enough to mask at least one at prob 0.001",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "cuda"),
}


GOOD = {"ids": torch.arange(2), "clones": 2, "grid": (4, 5), "tokens": 20, "prob": 0.5, "length": 3}
# Counts round down: of 20 tokens a span mask always keeps one, the others always mask one.
IMPOSSIBLE = {
    ("nothing kept", "span_mask"),
    ("nothing masked", "inverse_block_mask"),
    ("nothing masked", "random_mask"),
}
CALLS = [
    pytest.param(op, case, id=f"{op.__name__}-{case}")
    for op in (inverse_block_mask, span_mask, random_mask)
    for case in ARGUMENTS
    if set(ARGUMENTS[case][0]) & set(inspect.signature(op).parameters)
    and (case, op.__name__) not in IMPOSSIBLE
]


@pytest.mark.parametrize(("op", "case"), CALLS)
def test_argument_errors(op, case):
    changed, error, message = ARGUMENTS[case]
    known = inspect.signature(op).parameters
    with pytest.raises(error, match=message):
        op(**{name: value for name, value in {**GOOD, **changed}.items() if name in known})


def test_fullgraph(generate):
    compiled = torch.compile(lambda ids: generate(ids, 3, seed=5, epoch=1), fullgraph=True, backend="eager")
    ids = torch.tensor([4, 2**40])
    assert_same_plan(compiled(ids), generate(ids, 3, seed=5, epoch=1))


def test_one_graph_serves_every_epoch_and_seed(generate):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda ids, epoch, seed: generate(ids, 3, seed=seed, epoch=epoch), fullgraph=True, backend=count
    )
    ids = torch.tensor([4, 2**40])
    for seed, epoch in ((5, 1), (-5, 2), (2**40, 2**32 - 1)):
        plan = compiled(ids, torch.tensor(epoch), torch.tensor(seed))
        assert_same_plan(plan, generate(ids, 3, seed=seed, epoch=epoch))
    assert len(graphs) == 1
