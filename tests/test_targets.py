"""Targets: the streaming average against a list of torch's own norms, its memory, its refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2vkern.ops.targets import LayerTargets, layer_targets
from d2vkern.reference import targets as reference
from d2vkern.testing import assert_bitwise_equal, peak_memory

NORMS = ("instance", "layer", "batch", None)


def torch_norm(x: Tensor, norm: str | None) -> Tensor:
    channels_first = x.transpose(1, 2)
    if norm == "instance":
        return F.instance_norm(channels_first).transpose(1, 2)
    if norm == "batch":
        return F.batch_norm(channels_first, None, None, training=True).transpose(1, 2)
    return F.layer_norm(x, x.shape[-1:]) if norm == "layer" else x


def oracle(layers: list[Tensor], norm: str | None, final: str | None) -> Tensor:
    return torch_norm(torch.stack([torch_norm(x.double(), norm) for x in layers]).mean(0), final)


def make_layers(
    count: int = 3, shape: tuple[int, ...] = (2, 7, 6), dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [(torch.randn(shape) * (k + 1) + 3 * k).to(dtype) for k in range(count)]


@pytest.mark.parametrize("final", ["layer", "instance", None])
@pytest.mark.parametrize("norm", NORMS)
def test_matches_torch_norms(norm: str | None, final: str | None) -> None:
    layers = make_layers()
    result = layer_targets(layers, norm, final)
    assert result.dtype == torch.float32 and result.is_contiguous()
    torch.testing.assert_close(result.double(), oracle(layers, norm, final), rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_slices_of_the_batch_change_nothing(norm: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = make_layers(shape=(5, 7, 6))
    whole = layer_targets(layers, norm, "layer")
    monkeypatch.setattr(reference, "SLICE", 2 * 7 * 6)
    torch.testing.assert_close(layer_targets(layers, norm, "layer"), whole, rtol=0, atol=1e-6)


def test_instance_norm_with_a_large_mean_keeps_its_digits() -> None:
    # fp32 rounds a mean of 1000 by 6e-5; E[x^2] - E[x]^2 would lose everything.
    x = torch.randn(2, 50, 4) + 1000.0
    torch.testing.assert_close(
        layer_targets([x], "instance").double(), oracle([x], "instance", None), rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("case", ["image_base", "audio_base", "audio_padded", "text_base"])
def test_golden_targets(goldens: Path, case: str) -> None:
    tensors = np.load(goldens / f"case_{case}.npz")
    top_k = json.loads((goldens / f"case_{case}.json").read_text())["cfg"]["average_top_k_layers"]
    layers = torch.from_numpy(tensors["teacher.layers"][-top_k:]).unbind()
    result = layer_targets(layers, "instance", "layer" if case == "image_base" else None)
    torch.testing.assert_close(result, torch.from_numpy(tensors["targets"]), rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_layers_are_summed_in_fp32(dtype: torch.dtype) -> None:
    layers = make_layers(count=4, dtype=dtype)
    result = layer_targets(layers, "instance", "layer")
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), oracle(layers, "instance", "layer"), rtol=0, atol=2e-6)


def test_fp64_layers_give_fp64() -> None:
    layers = make_layers(dtype=torch.float64)
    result = layer_targets(layers, "instance", "layer")
    torch.testing.assert_close(result, oracle(layers, "instance", "layer"), rtol=0, atol=1e-12)


def test_streaming_is_reusable_bitwise_and_leaves_layers_alone() -> None:
    layers = make_layers()
    originals = [x.clone() for x in layers]
    targets = LayerTargets("instance", "layer")
    results = []
    for _ in range(2):
        for x in layers:
            targets.add(x)
        assert targets.layers == 3
        results.append(targets.result())
        assert targets.layers == 0
    assert_bitwise_equal(results[0], results[1])
    assert_bitwise_equal(results[0], layer_targets(iter(layers), "instance", "layer"))
    for x, original in zip(layers, originals, strict=True):
        assert_bitwise_equal(x, original)


def test_without_norms_a_single_layer_comes_back_as_a_copy() -> None:
    x = torch.randn(2, 3, 4)
    result = layer_targets([x], None)
    assert_bitwise_equal(result, x)
    assert result.data_ptr() != x.data_ptr()


def test_non_contiguous_layers() -> None:
    layers = [x.transpose(0, 1) for x in make_layers(shape=(7, 2, 6))]
    extra_token_cut = [torch.randn(2, 8, 6)[:, 1:] for _ in range(2)]
    for some in (layers, extra_token_cut):
        torch.testing.assert_close(
            layer_targets(some, "instance").double(), oracle(some, "instance", None), rtol=0, atol=2e-6
        )


def test_no_gradient_reaches_the_layers() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert not layer_targets([x * 2], "instance", "layer").requires_grad


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_zero_sizes(norm: str | None, shape: tuple[int, ...]) -> None:
    assert layer_targets([torch.randn(shape)] * 2, norm, "layer").shape == shape


def test_one_token_is_its_own_mean() -> None:
    assert torch.equal(layer_targets([torch.randn(2, 1, 4)], "instance"), torch.zeros(2, 1, 4))


@pytest.mark.parametrize("norm", ["instance", "layer", None])
def test_memory_does_not_grow_with_layers_and_stays_near_one_accumulator(norm: str | None) -> None:
    shape = (8, 256, 384)
    size = 8 * 256 * 384 * 4

    def run(count: int) -> None:
        layer_targets((torch.full(shape, float(k)) for k in range(count)), norm, "layer")

    few, many = peak_memory(lambda: run(2)), peak_memory(lambda: run(12))
    assert many <= few + 4096
    # The accumulator, a layer with its successor being made, and slices of 1 MiB.
    assert many <= 3 * size + 4 * 2**20


@pytest.mark.parametrize("norm", NORMS)
def test_compiles_without_graph_breaks(norm: str | None) -> None:
    layers = make_layers()
    compiled = torch.compile(lambda xs: layer_targets(xs, norm, "layer"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(layers), layer_targets(layers, norm, "layer"), rtol=0, atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match="targets: norm must be one of 'instance', 'layer', 'batch', None, got 'group'"
    ):
        LayerTargets("group")
    with pytest.raises(
        ValueError, match="targets: final must be one of 'layer', 'instance', None, got 'batch'"
    ):
        LayerTargets("layer", "batch")
    targets = LayerTargets()
    with pytest.raises(ValueError, match="targets: result must follow at least 1 added layer, got 0"):
        targets.result()
    with pytest.raises(ValueError, match=r"targets: layer_out must have shape \(B, T, D\), got \(3, 4\)"):
        targets.add(torch.randn(3, 4))
    with pytest.raises(TypeError, match="targets: layer_out must have dtype .*, got int64"):
        targets.add(torch.zeros(2, 3, 4, dtype=torch.int64))
    targets.add(torch.randn(2, 3, 4))
    with pytest.raises(
        ValueError, match=r"layer_out must have shape \(2, 3, 4\) like the first layer, got \(2, 3, 5\)"
    ):
        targets.add(torch.randn(2, 3, 5))
