"""The Triton masks against eager, bit for bit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import lookup_backend

from d2vkern import MaskPlan, inverse_block_mask, random_mask, span_mask
from d2vkern._nvtx import force_ranges, tally_costs
from d2vkern.reference import masks as eager
from d2vkern.testing import assert_bitwise_equal, backend_spy

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from d2vkern.kernels import masks as kernels
from d2vkern.kernels._launch import record_launches

Sampler = Callable[..., MaskPlan]
IDS = (3, -1, 2**40 + 5, -(2**63))


def image(grid: tuple[int, int], prob: float, length: int, adjust: float = 0.07) -> Sampler:
    return lambda ids, clones, **more: inverse_block_mask(
        ids, clones, grid, prob=prob, length=length, adjust=adjust, **more
    )


def audio(tokens: int, prob: float = 0.5, length: int = 5, adjust: float = 0.05) -> Sampler:
    return lambda ids, clones, **more: span_mask(
        ids, clones, tokens, prob=prob, length=length, adjust=adjust, **more
    )


def text(tokens: int, prob: float) -> Sampler:
    return lambda ids, clones, **more: random_mask(ids, clones, tokens, prob=prob, **more)


# name: (sampler, samples, clones). The interpreter takes 0.1 s a row.
CASES: dict[str, tuple[Sampler, int, int]] = {
    "image_base": (image((14, 14), 0.8, 3), 1, 4),
    "clones, as many as image_base": (image((4, 6), 0.7, 3), 1, 16),
    "image_large": (image((14, 14), 0.75, 3, 0.1), 2, 1),
    "image_huge14, rows of a power of two": (image((16, 16), 0.75, 3, 0.1), 2, 2),
    "image_tiny": (image((8, 8), 0.7, 3), 2, 2),
    "rectangular grid": (image((5, 9), 0.7, 3), 2, 2),
    "grid of one row": (image((1, 40), 0.7, 3, 0.3), 2, 2),
    "grid of one column": (image((40, 1), 0.7, 3, 0.3), 2, 2),
    "even squares reach further up and left": (image((9, 11), 0.7, 4, 0.4), 2, 2),
    "squares of one cell": (image((6, 7), 0.6, 1), 2, 2),
    "squares larger than the grid": (image((7, 3), 0.3, 5, 1.0), 2, 2),
    "squares that overlap a lot, cells removed": (image((10, 10), 0.9, 5, 1.0), 2, 2),
    "no square fits": (image((3, 3), 0.7, 3, 0.0), 2, 2),
    "image, one kept": (image((5, 5), 0.95, 2, 1.0), 2, 2),
    "image, one masked": (image((5, 5), 0.01, 3, 1.0), 2, 2),
    "audio_base": (audio(780), 1, 2),
    "audio_large, prime": (audio(599, 0.55, 5, 0.1), 2, 1),
    "audio_tiny": (audio(49), 2, 2),
    "more centres than are drawn at a time": (audio(300, 0.6, 3), 2, 1),
    "even spans reach one further back": (audio(77, 0.5, 10), 2, 2),
    "spans longer than the row": (audio(40, 0.5, 100, 1.0), 2, 1),
    "spans of one token": (audio(33, 0.5, 1), 2, 2),
    "one block of cells": (audio(64), 2, 2),
    "one cell more than a block": (audio(65), 2, 2),
    "audio, one kept": (audio(50, 0.98), 2, 2),
    "audio, one masked": (audio(20, 0.05, 3, 1.0), 2, 2),
    "text_base": (text(512, 0.48), 2, 2),
    "text, prime": (text(127, 0.5), 1, 7),
    "two tokens": (text(2, 0.5), 4, 2),
    "text, one kept": (text(50, 0.98), 2, 2),
    "text, one masked": (text(50, 0.01), 2, 2),
}
SMALL = {"image": image((5, 9), 0.7, 3), "audio": audio(45), "text": text(45, 0.48)}


@pytest.fixture(params=SMALL)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return SMALL[request.param]


def assert_same_plan(actual: MaskPlan, expected: MaskPlan) -> None:
    for name in ("mask", "ids_keep", "slot"):
        assert_bitwise_equal(getattr(actual, name), getattr(expected, name))
        assert getattr(actual, name).is_contiguous()
    assert actual.clones == expected.clones


def assert_equals_eager(sampler: Sampler, ids: Tensor, clones: int, **more: Any) -> None:
    with backend_spy() as calls:
        plan = sampler(ids, clones, backend="triton", **more)
    assert calls == [("masks", "triton")]
    assert_same_plan(plan, sampler(ids, clones, backend="eager", **more))


@pytest.mark.parametrize("case", CASES)
def test_equals_eager(case: str, triton_device: torch.device, poisoned_empty: None) -> None:
    sampler, samples, clones = CASES[case]
    ids = torch.tensor(IDS[:samples], device=triton_device)
    assert_equals_eager(sampler, ids, clones, seed=11, epoch=2)


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**40 + 5, -(2**63), 2**64 - 1])
@pytest.mark.parametrize("epoch", [1, 2**32 - 1])
def test_any_key(seed: int, epoch: int, triton_device: torch.device) -> None:
    ids = torch.tensor(IDS[:2], device=triton_device)
    assert_equals_eager(text(9, 0.5), ids, 1, seed=seed, epoch=epoch)


@pytest.mark.parametrize("given", ["seed", "epoch", "both"])
def test_seed_and_epoch_from_the_device(
    given: str, sampler: Sampler, triton_device: torch.device, poisoned_empty: None
) -> None:
    ids = torch.tensor(IDS[:2], device=triton_device)
    key: dict[str, Any] = {"seed": -(2**40) - 3, "epoch": 2**32 - 7}
    expected = sampler(ids, 2, backend="eager", **key)
    for name in key:
        if given in (name, "both"):
            key[name] = torch.tensor(key[name], device=triton_device)
    assert_same_plan(sampler(ids, 2, backend="triton", **key), expected)


def test_of_an_epoch_tensor_the_low_word_counts(triton_device: torch.device) -> None:
    ids = torch.tensor(IDS, device=triton_device)
    for epoch in (2**32 + 5, 5 - 2**32):
        assert_equals_eager(text(9, 0.5), ids, 1, epoch=torch.tensor(epoch, device=triton_device))


def test_ids_of_any_stride(sampler: Sampler, triton_device: torch.device) -> None:
    ids = torch.tensor(IDS, device=triton_device)
    assert_equals_eager(sampler, ids[::2], 2)
    assert_equals_eager(sampler, ids[1:2].expand(3), 1)


def test_no_samples(sampler: Sampler, triton_device: torch.device) -> None:
    with record_launches() as launches:
        assert_equals_eager(sampler, torch.zeros(0, dtype=torch.int64, device=triton_device), 3)
    assert launches == []


def test_repeats_and_leaves_inputs_alone(sampler: Sampler, triton_device: torch.device) -> None:
    ids, epoch = torch.tensor(IDS[:2], device=triton_device), torch.tensor(7, device=triton_device)
    first, second = (sampler(ids, 2, epoch=epoch, backend="triton") for _ in range(2))
    assert_same_plan(first, second)
    assert ids.tolist() == list(IDS[:2]) and epoch == 7


@pytest.mark.parametrize("tokens", [64, 150])
@pytest.mark.parametrize("target", ["fewer marked", "more marked", "nothing marked"])
def test_rows_in_tiles(
    target: str, tokens: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 cells are two tiles and a part of a third, 64 are one tile, all of it."""
    monkeypatch.setattr(kernels, "REGISTER_TOKENS", 63)
    monkeypatch.setattr(kernels, "TILE", 64)
    settings = {
        "fewer marked": audio(tokens, 0.5, 5, 0.0),
        "more marked": audio(tokens, 0.3, 7, 1.0),
        "nothing marked": text(tokens, 0.48),
    }
    with record_launches() as launches:
        assert_equals_eager(settings[target], torch.tensor(IDS[:2], device=triton_device), 1, seed=3)
    assert [launch.constexprs["TILED"] for launch in launches] == [True]


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("target", ["fewer marked", "more marked", "nothing marked"])
def test_ties_go_to_the_smaller_position(target: str, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With four different priorities nearly every choice is one among equals."""
    if torch.cuda.is_available():
        pytest.skip("a compiled kernel cannot be given other draws")
    draws, row_draws = kernels._draws, eager.row_draws
    monkeypatch.setattr(kernels, "_draws", lambda *args: draws(*args) & 0xC0000000)
    monkeypatch.setattr(eager, "row_draws", lambda *args, **key: row_draws(*args, **key) & 0xC0000000)
    if tiled:
        monkeypatch.setattr(kernels, "REGISTER_TOKENS", 63)
        monkeypatch.setattr(kernels, "TILE", 64)
    settings = {
        "fewer marked": audio(100, 0.5, 5, 0.0),
        "more marked": audio(100, 0.1, 20, 1.0),
        "nothing marked": text(100, 0.48),
    }
    assert_equals_eager(settings[target], torch.tensor(IDS[:2]), 1)


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_extreme_priorities(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that do not compete carry the largest word too."""
    if torch.cuda.is_available():
        pytest.skip("a compiled kernel cannot be given other draws")
    draws, row_draws = kernels._draws, eager.row_draws
    monkeypatch.setattr(kernels, "_draws", lambda *args: draws(*args) * 0 + word)
    monkeypatch.setattr(eager, "row_draws", lambda *args, **key: row_draws(*args, **key) * 0 + word)
    for settings in SMALL.values():
        assert_equals_eager(settings, torch.tensor(IDS[:1]), 1)


def test_one_launch_of_the_contracts_bytes(sampler: Sampler, triton_device: torch.device) -> None:
    ids = torch.tensor(IDS[:3], device=triton_device)
    with record_launches() as launches, force_ranges(True), tally_costs() as tallies:
        plan = sampler(ids, 2, backend="triton")
    assert [launch.grid for launch in launches] == [(6,)]
    written = sum(x.numel() * x.element_size() for x in (plan.mask, plan.ids_keep, plan.slot))
    assert {name: (tally.calls, tally.bytes) for name, tally in tallies.items()} == {
        "masks/fwd/triton": (1, written + 8 * 3)
    }


def test_every_key_is_of_one_type(triton_device: torch.device) -> None:
    """Words as signed 32-bit arguments: an unsigned or 64-bit one would be compiled for anew."""
    for seed, epoch in ((0, 0), (-1, 2**31), (2**64 - 1, 2**32 - 1), (2**31 << 32, 1)):
        with record_launches() as launches:
            text(9, 0.5)(
                torch.tensor(IDS[:1], device=triton_device), 1, seed=seed, epoch=epoch, backend="triton"
            )
        words = launches[0].args[7:10]
        assert [word & 0xFFFFFFFF for word in words] == [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, epoch]
        assert all(-(2**31) <= word < 2**31 for word in words)


def test_meta_tensors(sampler: Sampler) -> None:
    ids = torch.zeros(3, dtype=torch.int64, device="meta")
    real = sampler(torch.arange(3), 2, backend="eager")
    with record_launches() as launches:
        plan = sampler(ids, 2, backend="triton")
    assert len(launches) == 1
    for name in ("mask", "ids_keep", "slot"):
        meta, value = getattr(plan, name), getattr(real, name)
        assert (meta.device.type, meta.shape, meta.dtype) == ("meta", value.shape, value.dtype)


@pytest.mark.parametrize("tensors", [False, True])
def test_opcheck(tensors: bool, triton_device: torch.device) -> None:
    ids = torch.tensor(IDS[:1], device=triton_device)
    seed, epoch = (torch.tensor(x, device=triton_device) if tensors else None for x in (5, 6))
    args = (ids, seed, epoch, [5, 0, 6], 1, [3, 5], [3, 3], 2, 6, True)
    torch.library.opcheck(torch.ops.d2vkern.masks_fwd.default, args)


def compile_counting(
    function: Callable[..., MaskPlan], **options: Any
) -> tuple[Callable[..., MaskPlan], list[Any]]:
    """The function compiled, and a list that grows with every graph made for it."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options), graphs


def test_one_graph_serves_all_keys_on_the_device(sampler: Sampler, triton_device: torch.device) -> None:
    compiled, graphs = compile_counting(
        lambda ids, seed, epoch: sampler(ids, 1, seed=seed, epoch=epoch, backend="triton")
    )
    ids = torch.tensor(IDS[:2], device=triton_device)
    for seed, epoch in ((5, 1), (-(2**40), 2**32 - 1)):
        key = [torch.tensor(value, device=triton_device) for value in (seed, epoch)]
        expected = sampler(ids, 1, seed=seed, epoch=epoch, backend="eager")
        assert_same_plan(compiled(ids, *key), expected)
    assert len(graphs) == 1


def test_fullgraph_with_changing_integers(triton_device: torch.device) -> None:
    """Batch, clones, seed and epoch become symbols: two graphs, not one per epoch."""
    sampler = text(9, 0.5)
    compiled, graphs = compile_counting(
        lambda ids, clones, seed, epoch: sampler(ids, clones, seed=seed, epoch=epoch, backend="triton")
    )
    ids = torch.tensor(IDS, device=triton_device)
    for samples, clones, seed, epoch in ((2, 3, 5, 2), (3, 2, -6, 3), (2, 4, 2**40, 2**32 - 1)):
        expected = sampler(ids[:samples], clones, seed=seed, epoch=epoch, backend="eager")
        assert_same_plan(compiled(ids[:samples], clones, seed, epoch), expected)
    assert len(graphs) == 2


def test_one_graph_serves_all_lengths(triton_device: torch.device) -> None:
    compiled, graphs = compile_counting(
        lambda ids, x: audio(x.shape[0])(ids, 1, seed=1, backend="triton"), dynamic=True
    )
    ids = torch.tensor(IDS[:2], device=triton_device)
    made = []
    for tokens in (45, 50, 64):
        expected = audio(tokens)(ids, 1, seed=1, backend="eager")
        assert_same_plan(compiled(ids, torch.zeros(tokens)), expected)
        made.append(len(graphs))
    # Dynamo starts over once, to make constants of the settings.
    assert made[0] == made[-1]


@pytest.mark.gpu
def test_a_replayed_graph_draws_for_the_epoch_it_is_given(sampler: Sampler) -> None:
    ids, epoch = torch.tensor(IDS, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    sampler(ids, 2, epoch=epoch, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = sampler(ids, 2, epoch=epoch, backend="triton")
    for number in (3, 2**32 - 1):
        epoch.fill_(number)
        graph.replay()
        assert_same_plan(plan, sampler(ids, 2, epoch=number, backend="eager"))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1500, 4096, 8192, 8193, 20_000, 40_001])
def test_long_rows(tokens: int) -> None:
    ids = torch.tensor(IDS, device="cuda")
    for settings in (audio(tokens), text(tokens, 0.48)):
        assert_equals_eager(settings, ids, 8)


@pytest.mark.gpu
def test_offsets_past_2_to_31() -> None:
    clones, tokens = 4096, 512
    ids = torch.arange(2**31 // (clones * tokens) + 1, device="cuda")
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    plan = text(tokens, 0.48)(ids, clones, backend="triton")
    last = text(tokens, 0.48)(ids[-1:], clones, backend="eager")
    for name in ("mask", "ids_keep", "slot"):
        assert_bitwise_equal(getattr(plan, name)[-clones:], getattr(last, name))
