"""Collapse alarms: the two numbers they rest on, their thresholds, and the toy that collapses for real."""

import dataclasses
import math

import pytest
import torch

from d2v.config.fronts import LogMelFront, WaveformFront
from d2v.config.run import TrainConfig
from d2v.train.health import (
    PARTS,
    REPEAT_AFTER,
    Alarm,
    AlarmLog,
    Health,
    deviation,
    effective_rank,
    judge,
    measure,
)
from d2v.train.pretrain import run
from tests.d2v.tiny_runs import tiny
from tests.d2v.transfers import META, no_transfers

CFG = TrainConfig(min_rank=0.05, min_variance=0.05)


def orthogonal_rows(n: int, singular_values: list[float]) -> torch.Tensor:
    """Rows [n, D] with zero mean and exactly these singular values."""
    d = len(singular_values)
    basis = torch.linalg.qr(torch.cat([torch.ones(n, 1), torch.randn(n, d)], dim=1).double())[0][:, 1:]
    return basis @ torch.diag(torch.tensor(singular_values, dtype=torch.float64))


def test_deviation_is_the_mean_over_channels():
    rows = torch.stack([torch.tensor([0.0, 3.0, 6.0]), torch.tensor([1.0, 1.0, 1.0])], dim=1)
    assert deviation(rows).item() == pytest.approx((math.sqrt(9 + 1e-6) + 1e-3) / 2)


@pytest.mark.parametrize("n", [0, 1])
def test_deviation_of_too_few_rows_is_zero(n):
    assert deviation(torch.randn(n, 4)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deviation_is_fp32(dtype):
    assert deviation(torch.randn(8, 4).to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("k", [1, 3, 8])
def test_rank_of_equal_singular_values_is_their_number(k):
    rows = orthogonal_rows(32, [2.0] * k + [0.0] * (8 - k))
    assert effective_rank(rows).item() == pytest.approx(k, rel=1e-6)


def test_rank_is_the_exponential_of_the_entropy():
    share = torch.tensor([0.5, 0.3, 0.2])
    expected = math.exp(-(share * share.log()).sum().item())
    assert effective_rank(orthogonal_rows(16, [5.0, 3.0, 2.0])).item() == pytest.approx(expected, rel=1e-6)


def test_rank_ignores_a_common_offset():
    rows = orthogonal_rows(32, [1.0, 1.0, 1.0, 0.0])
    assert effective_rank(rows + 100.0).item() == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize(
    "rows", [torch.zeros(0, 4), torch.zeros(3, 0), torch.full((16, 4), 0.1), torch.randn(1, 4)]
)
def test_rank_of_nothing_or_of_equal_rows_is_zero(rows):
    assert effective_rank(rows).item() == 0.0


SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "1/i": lambda i: 1 / i,
    "six decades": lambda i: 10 ** (-6 * i / i.numel()),
    "a line and noise": lambda i: torch.where(i > 1, 1e-3, 1.0),
    "a line and less": lambda i: torch.where(i > 1, 1e-6, 1.0),
    "a few": lambda i: (i < 6).double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_rank_is_that_of_the_singular_values(spectrum, shape, scale):
    """To more than three digits, though it comes from squares of them, and for fp32 rows off centre too."""
    n, d = shape
    values = SPECTRA[spectrum](torch.arange(1, min(n, d) + 1, dtype=torch.float64))
    left, right = (torch.linalg.qr(torch.randn(m, min(n, d)).double())[0] for m in (n, d))
    rows = scale * ((left * values) @ right.T + 0.1)
    for given in (rows, rows.float()):
        centred = given.double() - given.double().mean(0)
        found = torch.linalg.svdvals(centred)
        # rounding of the rows themselves is no direction
        found = found[found > 1e-7 * given.abs().amax().double() * max(n, d) ** 0.5]
        share = found / found.sum()
        expected = torch.special.entr(share).sum().exp().item()
        assert effective_rank(given).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rank_of_what_is_not_finite_is_nan(bad):
    rows = torch.randn(8, 4)
    rows[2, 1] = bad
    assert math.isnan(effective_rank(rows).item())


def test_rank_is_computed_on_the_device():
    rows = torch.randn(8, 4, device=META)
    with no_transfers():
        assert effective_rank(rows).device == deviation(rows).device == META


def test_rank_needs_no_contiguous_rows():
    rows = torch.randn(8, 32).t()
    torch.testing.assert_close(effective_rank(rows), effective_rank(rows.contiguous()))


def test_measure_leaves_out_rows_that_are_not_finite():
    rows = torch.randn(64, 4)
    rows[3] = float("nan")
    (state,) = measure({"front": rows})
    assert math.isfinite(state.variance)
    assert 3.0 < state.rank <= 4.0
    assert (state.part.short, state.width, state.most) == ("front", 4, 4)


def test_healthy_rows_raise_no_alarm():
    states = measure({part: torch.randn(256, 16) for part in ("front", "prediction", "target")})
    assert [s.part.key for s in states] == ["front", "prediction", "target"]
    assert judge(states, CFG) == []


@pytest.mark.parametrize(
    ("part", "short"), [("front", "front"), ("prediction", "pred"), ("target", "target")]
)
def test_a_point_and_a_line_raise_the_alarm_of_their_part(part, short):
    good = {p: torch.randn(256, 32) for p in ("front", "prediction", "target")}
    point = judge(measure({**good, part: torch.full((256, 32), 0.5)}), CFG)
    assert [a.kind for a in point] == [f"{short}_variance", f"{short}_rank"]
    line = judge(measure({**good, part: torch.randn(256, 1) * torch.randn(1, 32)}), CFG)
    assert [a.kind for a in line] == [f"{short}_rank"]
    assert "rank 1.0 of 32" in line[0].message
    assert "optim.lr" in line[0].message


def test_the_threshold_is_a_share_of_the_rank_that_the_rows_can_have():
    state = Health(PARTS[2], width=768, variance=1.0, rank=8.0, most=9)
    assert judge([state], CFG) == []
    assert [a.kind for a in judge([dataclasses.replace(state, rank=0.4)], CFG)] == ["target_rank"]


def test_nothing_is_said_about_too_few_rows():
    assert judge(measure({"front": torch.ones(1, 8)}), CFG) == []


def test_an_alarm_is_repeated_only_after_ten_lines():
    log, alarm, other = AlarmLog(), Alarm("front_rank", "m"), Alarm("target_rank", "m")
    printed = [log.fresh([alarm] + ([other] if line == 4 else [])) for line in range(2 * REPEAT_AFTER + 1)]
    assert [line for line, alarms in enumerate(printed) if alarm in alarms] == [
        0,
        REPEAT_AFTER,
        2 * REPEAT_AFTER,
    ]
    assert [line for line, alarms in enumerate(printed) if other in alarms] == [4]


STRIDES = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
FRONTS = {
    "waveform": WaveformFront(
        conv_layers=tuple((64, kernel, stride) for kernel, stride in STRIDES),
        position_groups=8,
        position_layers=2,
        position_width=38,
    ),
    "logmel": LogMelFront(position_groups=8, position_layers=2, position_width=38),
}


@pytest.mark.slow
@pytest.mark.parametrize("front", ["waveform", "logmel"])
def test_the_waveform_toy_collapses_and_its_alarm_fires(front, tmp_path, capsys):
    """fairseq issue 5239: loss falls, target variance rises, and the front end dies unseen by both.

    The same run on log-mel frames, which cannot collapse, stays silent.
    """
    optim = {"lr": 3e-3, "warmup": 10, "schedule": "constant", "clip": None}
    cfg = tiny("audio", steps=70, batch=6, optim=optim, train={"log_every": 5, "alarm_after": 10})
    model = dataclasses.replace(
        cfg.model,
        front=FRONTS[front],
        dim=48,
        heads=4,
        depth=3,
        mask=dataclasses.replace(cfg.model.mask, clones=4),
        decoder=dataclasses.replace(cfg.model.decoder, dim=48, groups=8),
        target=dataclasses.replace(cfg.model.target, top_k=3),
    )
    ema = dataclasses.replace(cfg.ema, decay=0.99, end_decay=0.9995, anneal=1_000)
    rows = run(dataclasses.replace(cfg, model=model, ema=ema), "speech", tmp_path / "r").metrics
    first, last = rows[0], rows[-1]
    fired = [kind for row in rows for kind in row["alarms"]]
    assert last["target_var"] > first["target_var"] > 0.1
    if front == "logmel":
        assert last["front_var"] > first["front_var"]
        assert fired == []
        return
    assert last["loss"] < first["loss"]
    assert last["front_var"] < 0.2 * first["front_var"]
    assert set(fired) == {"front_variance"}
    assert "use a log-mel front end (fairseq issue 5239)" in capsys.readouterr().out
