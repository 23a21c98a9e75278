"""scatter_tokens with a mask token: MAE's decoder of transformers, torch.compile, autocast, direct calls."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from d2vkern import MaskPlan, _native, gather_tokens, random_mask, scatter_tokens
from d2vkern._nvtx import force_ranges, tally_costs
from d2vkern.testing import assert_bitwise_equal, backend_spy

BACKENDS = [
    "eager",
    pytest.param("native", marks=pytest.mark.skipif(bool(_native.problem()), reason=_native.problem())),
    "triton",
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, triton_device: torch.device) -> Iterator[str]:
    with (
        torch.device(triton_device)
        if request.param == "triton" and triton_device.type == "cuda"
        else nullcontext()
    ):
        yield request.param


def test_maes_decoder(backend: str) -> None:
    """ViTMAEDecoder without blocks, whose input comes in the order of MAE's shuffle, ours in the plan's."""
    mae = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    N, patches, K, width = 3, 16, 5, 12
    config = mae.ViTMAEConfig(
        hidden_size=8, decoder_hidden_size=width, decoder_num_hidden_layers=0, decoder_num_attention_heads=2,
        image_size=8, patch_size=2,
    )  # fmt: skip
    decoder = mae.ViTMAEDecoder(config, patches)
    torch.nn.init.normal_(decoder.mask_token)
    shuffled = torch.rand(N, patches).argsort(1)
    restore, ids_keep = shuffled.argsort(1), shuffled[:, :K]
    encoded = torch.randn(N, 1 + K, 8, requires_grad=True)
    theirs = decoder(encoded, restore).logits

    plan = MaskPlan.from_ids_keep(ids_keep, patches)
    order = pad(1 + ids_keep.argsort(1), (1, 0))[..., None].expand_as(encoded)
    x = decoder.decoder_embed(encoded.gather(1, order))
    with backend_spy() as calls:
        x = scatter_tokens(x, plan, mask_token=decoder.mask_token, keep_extra=True, backend=backend)
    assert calls == [("gather", backend)]
    ours = decoder.decoder_pred(decoder.decoder_norm(x + decoder.decoder_pos_embed))[:, 1:]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    leaves = [encoded, *(p for p in decoder.parameters() if p.requires_grad)]
    dout = torch.randn_like(ours)
    grads = (torch.autograd.grad(out, leaves, dout) for out in (ours, theirs))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep_extra", [False, True])
def test_the_tokens_gradient_repeats_and_is_summed_wide(keep_extra: bool, backend: str) -> None:
    """fp16 sums would lose each 1 beside 4096; more places than one partial sum takes."""
    rows, tokens, width = 6, 90, 10
    plan = MaskPlan.from_mask(torch.ones(rows, tokens), 2)
    token = torch.zeros(width, dtype=torch.float16, requires_grad=True)
    out = scatter_tokens(
        torch.zeros(rows, 2, width, dtype=torch.float16),
        plan,
        mask_token=token,
        keep_extra=keep_extra,
        backend=backend,
    )
    dout = torch.ones_like(out)
    dout[0, 2 * keep_extra] = 4096.0
    first, again = (torch.autograd.grad(out, token, dout, retain_graph=True)[0] for _ in range(2))
    assert_bitwise_equal(first, again)
    assert (first == torch.tensor(4096.0 + rows * tokens - 1).half()).all()


@pytest.mark.parametrize("wanted", ["x", "token"])
def test_only_what_is_needed(wanted: str, backend: str) -> None:
    plan = random_mask(torch.arange(2), 2, 6, prob=0.5)
    x, token = torch.randn(4, 4, 8), torch.randn(8)
    (x if wanted == "x" else token).requires_grad_()
    scatter_tokens(x, plan, mask_token=token, keep_extra=True, backend=backend).sum().backward()
    assert (x.grad is None) == (wanted == "token") and (token.grad is None) == (wanted == "x")


def test_empty_widths_and_everything_kept(backend: str) -> None:
    nothing = random_mask(torch.arange(2), 2, 6, prob=0.5)
    token = torch.zeros(0, requires_grad=True)
    out = scatter_tokens(torch.zeros(4, 4, 0), nothing, mask_token=token, keep_extra=True, backend=backend)
    assert out.shape == (4, 7, 0)
    out.sum().backward()
    assert token.grad.shape == (0,)
    plan = MaskPlan.from_mask(torch.zeros(4, 6), 2)
    x, token = torch.randn(4, 6, 8), torch.randn(8, requires_grad=True)
    out = scatter_tokens(x, plan, mask_token=token, backend=backend)
    assert_bitwise_equal(out.detach(), x)
    out.sum().backward()
    assert (token.grad == 0).all()


def both_ways(x: Tensor, extra: Tensor, token: Tensor, plan: MaskPlan, backend: str) -> Tensor:
    kept = gather_tokens(x, plan, extra, backend=backend)
    return scatter_tokens(kept, plan, mask_token=token, keep_extra=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
def test_one_graph_serves_padded_plans_of_several_sizes(backend: str) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(both_ways, fullgraph=True, backend=count, dynamic=True)
    for samples, tokens in ((3, 11), (5, 13)):
        mask = torch.rand(2 * samples, tokens).argsort(1) < torch.arange(2 * samples)[:, None] % 4 + 1
        plan = MaskPlan.from_mask(mask, 2, pad=True)
        results = []
        leaves = [torch.randn(s, requires_grad=True) for s in ((samples, tokens, 8), (2, 8), (8,))]
        for run in (compiled, both_ways):
            out = run(*leaves, plan, backend)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, torch.cos(out.detach()))])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("namespace", ["d2vkern", "d2vkern_native"])
def test_opcheck(namespace: str, triton_device: torch.device) -> None:
    if namespace == "d2vkern_native" and _native.problem():
        pytest.skip(_native.problem())
    device = triton_device if namespace == "d2vkern" else torch.device("cpu")
    plan = random_mask(torch.arange(2, device=device), 3, 5, prob=0.4)
    ops = getattr(torch.ops, namespace)
    x, dout, token = (torch.randn(size, device=device) for size in ((6, 5, 8), (6, 7, 8), (8,)))
    for op, arguments in (
        (ops.scatter_fwd, (x, plan.slot, 2, 0.0, None, [0, 0], token, True)),
        (ops.scatter_fwd, (x, plan.slot, 2, 0.0, None, [0, 0], token, False)),
        (ops.scatter_bwd, (dout[:, 2:], plan.ids_keep, 2, dout[:, :2])),
        (ops.mask_token_bwd, (dout[:, 2:], plan.slot)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_autocast_promotes_as_cat_does() -> None:
    plan = random_mask(torch.arange(2), 2, 6, prob=0.5)
    x, token = torch.randn(4, 3, 8).bfloat16().requires_grad_(), torch.randn(1, 1, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = scatter_tokens(x, plan, mask_token=token)
        assert out.dtype == torch.cat([x, token.expand(4, -1, -1)], 1).dtype
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and token.grad.dtype == torch.float32


def test_ranges_and_work(backend: str) -> None:
    plan = random_mask(torch.arange(2), 2, 6, prob=0.5)
    x, token = torch.randn(4, 4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    with force_ranges(True), tally_costs() as found:
        scatter_tokens(x, plan, mask_token=token, keep_extra=True, backend=backend).sum().backward()
    names = [f"scatter/fwd/{backend}", f"scatter/bwd/{backend}"]
    assert list(found) == (names if backend == "eager" else [*names, f"mask_token/bwd/{backend}"])
    assert all(tally.calls == 1 and tally.bytes > 0 for tally in found.values())


def test_refusals() -> None:
    plan = random_mask(torch.arange(2), 2, 6, prob=0.5)
    x = torch.zeros(4, 3, 8)
    for given, error, words in (
        (
            {"mask_token": torch.zeros(8), "noise_std": 0.1},
            ValueError,
            "noise_std must be 0 with mask_token, got 0.1",
        ),
        ({"mask_token": torch.zeros(7)}, ValueError, r"mask_token must have shape \(8,\) like x, got \(7,\)"),
        (
            {"mask_token": torch.zeros(1, 8)},
            ValueError,
            r"mask_token must have shape \(8,\) like x, got \(1, 8\)",
        ),
        (
            {"mask_token": torch.zeros(8).half()},
            TypeError,
            "mask_token must have dtype float32 like x, got float16",
        ),
        (
            {"mask_token": torch.zeros(8, device="meta")},
            ValueError,
            "mask_token must be on cpu like x, got meta",
        ),
    ):
        with pytest.raises(error, match=f"scatter_tokens: {words}"):
            scatter_tokens(x, plan, **given)
