"""Targets in Triton: against eager and fp64 over named shapes, in place, compiled, captured."""

import pytest
import torch
from torch import Tensor

from d2vkern._backend import BackendError
from d2vkern.ops.targets import LayerTargets, layer_targets
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, backend_spy

pytest.importorskip("triton")

from d2vkern.kernels import targets as kernels
from d2vkern.kernels._launch import record_launches

NORMS = ("instance", "layer", "batch", None)
SHAPES = {
    "small": (2, 7, 6),
    "primes": (3, 13, 11),
    "one token": (2, 1, 5),
    "one channel": (2, 5, 1),
    "one value": (1, 1, 1),
    "two tiles of tokens, the second nearly empty": (1, 65, 3),
    "two chunks of channels": (1, 4, 67),
    "longer than 512": (1, 513, 3),
}


def make_layers(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, mean: float = 3.0
) -> list[Tensor]:
    layers = [torch.randn(shape) * (k + 1) + mean * k for k in range(3)]
    return [layer.to(device, dtype) for layer in layers]


def assert_parity(layers: list[Tensor], norm: str | None, final: str | None) -> None:
    with backend_spy() as calls:
        ours = layer_targets(layers, norm, final, backend="triton")
    assert calls == [("targets", "triton")] * (len(layers) + 1)
    eager = layer_targets(layers, norm, final, backend="eager")
    exact = layer_targets([layer.double() for layer in layers], norm, final, backend="eager")
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    assert_no_worse_than_eager(ours, eager, exact)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_norms_match_eager(shape: tuple[int, ...], norm: str | None, triton_device: torch.device) -> None:
    assert_parity(make_layers(triton_device, shape), norm, None)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("final", ["layer", "instance"])
def test_final_norms_match_eager(norm: str | None, final: str, triton_device: torch.device) -> None:
    assert_parity(make_layers(triton_device, (3, 13, 11)), norm, final)


@pytest.mark.parametrize("norm", NORMS)
def test_fp16_layers_match_eager(norm: str | None, triton_device: torch.device) -> None:
    assert_parity(make_layers(triton_device, (2, 13, 40), torch.float16), norm, "layer")


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(5, 599, 768), (16, 196, 768), (3, 256, 1280)])
def test_bf16_layers_match_eager(
    shape: tuple[int, ...], norm: str | None, triton_device: torch.device
) -> None:
    assert_parity(make_layers(triton_device, shape, torch.bfloat16), norm, "layer")


@pytest.mark.parametrize("final", ["layer", "instance"])
def test_an_average_whose_variance_is_near_eps(final: str, triton_device: torch.device) -> None:
    # The final norm works on the sum, with an eps of layers^2 as much.
    layers = [layer * 3e-3 for layer in make_layers(triton_device, (2, 9, 5), mean=0.0)]
    assert_parity(layers, None, final)


def test_without_norms_the_bits_are_eagers(triton_device: torch.device) -> None:
    layers = make_layers(triton_device, (2, 7, 6))
    ours = layer_targets(layers, None, backend="triton")
    # PyTorch divides by a number on the CPU, and on a GPU multiplies by its reciprocal.
    eager = layer_targets([layer.cpu() for layer in layers], None, backend="eager")
    assert_bitwise_equal(ours.cpu(), eager)
    assert_bitwise_equal(layer_targets(layers[:1], None, backend="triton"), layers[0])


@pytest.mark.parametrize("norm", ["instance", "layer", "batch"])
def test_large_means_cost_no_digits(norm: str, triton_device: torch.device) -> None:
    layers = make_layers(triton_device, (2, 40, 33), mean=1000.0)
    ours = layer_targets(layers, norm, backend="triton")
    exact = layer_targets([layer.double() for layer in layers], norm, backend="eager")
    # A mean of 2000 is known to 6e-5 in fp32; uncorrected it would be off by that much.
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm", ["instance", "layer", "batch"])
def test_equal_values_become_zero(norm: str, triton_device: torch.device) -> None:
    layers = [torch.full((2, 37, 5), 1000.1, device=triton_device)]
    assert torch.equal(layer_targets(layers, norm, backend="triton").cpu(), torch.zeros(2, 37, 5))


@pytest.mark.parametrize("norm", NORMS)
def test_streaming_is_in_place_repeats_and_reads_no_unwritten_memory(
    norm: str | None, triton_device: torch.device, poisoned_empty: None
) -> None:
    layers = make_layers(triton_device, (3, 13, 11))
    originals = [layer.clone() for layer in layers]
    targets = LayerTargets(norm, "layer", backend="triton")
    results = []
    for _ in range(2):
        places = set()
        for layer in layers:
            targets.add(layer)
            places.add(targets._sum.data_ptr())
        results.append(targets.result())
        assert places == {results[-1].data_ptr()}
    assert results[0].isfinite().all()
    assert_bitwise_equal(results[0], results[1])
    assert_bitwise_equal(results[0], layer_targets(iter(layers), norm, "layer", backend="triton"))
    for layer, original in zip(layers, originals, strict=True):
        assert_bitwise_equal(layer, original)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", ["extra tokens cut off", "tokens first", "channels apart"])
def test_any_strides(form: str, norm: str | None, triton_device: torch.device) -> None:
    views = {
        "extra tokens cut off": lambda x: torch.cat([x.new_full((2, 2, 6), 9.0), x], 1)[:, 2:],
        "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels apart": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    }
    layers = make_layers(triton_device, (2, 7, 6))
    strided = [views[form](layer) for layer in layers]
    assert not strided[0].is_contiguous()
    assert_bitwise_equal(
        layer_targets(strided, norm, backend="triton"), layer_targets(layers, norm, backend="triton")
    )


def test_a_slice_is_not_copied(triton_device: torch.device) -> None:
    layer = torch.randn(2, 8, 6, device=triton_device)[:, 1:]
    for norm in NORMS:
        with record_launches() as launches:
            layer_targets([layer], norm, backend="triton")
        assert launches[0].args[0].data_ptr() == layer.data_ptr()


@pytest.mark.parametrize(
    ("norm", "final", "launches"), [("instance", "layer", 4), ("batch", None, 7), (None, None, 4)]
)
def test_launches(norm: str | None, final: str | None, launches: int, triton_device: torch.device) -> None:
    with record_launches() as recorded:
        layer_targets(make_layers(triton_device, (2, 7, 6)), norm, final, backend="triton")
    assert len(recorded) == launches


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_zero_sizes(shape: tuple[int, ...], norm: str | None, triton_device: torch.device) -> None:
    layers = [torch.randn(shape, device=triton_device)] * 2
    assert layer_targets(layers, norm, "layer", backend="triton").shape == shape


def test_layers_that_want_gradients_are_constants(triton_device: torch.device) -> None:
    x = torch.randn(2, 3, 4, device=triton_device, requires_grad=True)
    assert not layer_targets([x * 2], "instance", "layer", backend="triton").requires_grad


@pytest.mark.parametrize(
    ("norm", "dynamic"), [("instance", False), ("instance", True), ("layer", False), ("batch", True)]
)
def test_compiles_without_graph_breaks(norm: str | None, dynamic: bool, triton_device: torch.device) -> None:
    def function(layers: list[Tensor]) -> Tensor:
        return layer_targets(layers, norm, "layer", backend="triton")

    torch._dynamo.reset()  # the cases share one function, whose recompilations are counted together
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (7, 9):
        layers = make_layers(triton_device, (2, tokens, 6))
        assert_bitwise_equal(compiled(layers), function(layers))


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm: str | None, triton_device: torch.device) -> None:
    # Permuted in memory, contiguous along D.
    layer = torch.randn(5, 2, 4, device=triton_device).transpose(0, 1)
    total = torch.randn(2, 5, 4, device=triton_device)
    torch.library.opcheck(torch.ops.d2vkern.targets_accumulate.default, (total, layer, norm, False))
    torch.library.opcheck(torch.ops.d2vkern.targets_accumulate.default, (total, layer, norm, True))
    if norm != "batch":
        torch.library.opcheck(torch.ops.d2vkern.targets_finish.default, (total, 3, norm))


def test_autocast_changes_nothing(triton_device: torch.device) -> None:
    layers = make_layers(triton_device, (2, 7, 6))
    plain = layer_targets(layers, "instance", "layer", backend="triton")
    with torch.autocast(triton_device.type, torch.bfloat16):
        assert_bitwise_equal(layer_targets(layers, "instance", "layer", backend="triton"), plain)


def test_refusals() -> None:
    with pytest.raises(BackendError, match="targets: .* fp64 tensors run on eager only"):
        layer_targets([torch.randn(2, 3, 4, dtype=torch.float64)], backend="triton")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="targets: .* Triton's interpreter is wrong in bf16"):
            layer_targets([torch.randn(2, 3, 4).bfloat16()], backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_offsets_past_31_bits(norm: str | None, triton_device: torch.device) -> None:
    shape = (1100, 2048, 1024)
    layer = torch.zeros(shape, dtype=torch.bfloat16, device=triton_device)
    layer[-1, -9:] = torch.randn(9, 1024, device=triton_device)
    result = layer_targets([layer], norm, backend="triton")[-1]
    eager = layer_targets([layer], norm, backend="eager")[-1]
    torch.testing.assert_close(result, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_captured_in_a_cuda_graph(norm: str | None, triton_device: torch.device) -> None:
    layers = make_layers(triton_device, (2, 70, 96), torch.bfloat16)
    layer_targets(layers, norm, "layer", backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layer_targets(layers, norm, "layer", backend="triton")
    for layer in layers:
        layer.copy_(torch.randn_like(layer))
    graph.replay()
    assert_bitwise_equal(result, layer_targets(layers, norm, "layer", backend="triton"))


def test_tiles_follow_the_number_of_programs() -> None:
    # Few samples: narrow tiles, or most of a GPU would idle.
    assert kernels._token_tiles(5 * 768)[0]["BLOCK_D"] == 16
    assert kernels._token_tiles(16 * 768)[0]["BLOCK_D"] == 32
    for tile in kernels._token_tiles(768):
        assert tile["BLOCK_T"] * tile["BLOCK_D"] == 128 * tile["num_warps"]
