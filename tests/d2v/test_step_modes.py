"""train.compile and train.cuda_graph: same numbers, no waiting for the device, no frozen values."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from d2v.cli.parse import join_backends
from d2v.cli.train import TrainOptions, _with_modes
from d2v.config.fronts import WaveformFront
from d2v.config.model import Objective
from d2v.config.objectives import for_objective
from d2v.config.run import Config
from d2v.data.open import open_data
from d2v.data.types import Batch, Position
from d2v.tools.profile import run_profile
from d2v.train import cuda_graph, process
from d2v.train.checkpoint import load_checkpoint, save_checkpoint
from d2v.train.cuda_graph import StepGraphs
from d2v.train.learner import Outcome
from d2v.train.pretrain import run
from d2v.train.pretrain_step import Trainer
from d2vkern.testing import backend_spy
from tests.d2v.tiny_models import make_source
from tests.d2v.tiny_runs import make_data, tiny
from tests.d2v.transfers import META, no_transfers

CPU = torch.device("cpu")
MODALITIES = ["image", "audio", "text"]


def batch(modality: str, step: int, size: int = 4, epoch: int = 0) -> Batch:
    source = make_source(modality, size)
    source = source.roll(step, 0) if modality == "text" else source + 0.1 * step
    return Batch(source, torch.arange(size) + step, epoch)


def quiet(cfg: Config) -> Config:
    """Without layerdrop and attention dropout, which draw from host generators on a CPU."""
    model = dataclasses.replace(cfg.model, layerdrop=0.0, attention_dropout=0.0)
    return dataclasses.replace(cfg, model=model)


@pytest.mark.parametrize("modality", MODALITIES)
def test_compiled_training_gives_the_loss_curve(modality: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    # what Dynamo traces is in question here; Inductor takes minutes and is in the profile's test
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    curves = []
    for compile in (False, True):
        cfg = quiet(tiny(modality, train={"compile": compile, "steps": 4}, optim={"lr": 1e-2}))
        dropped = {name: 0.0 for name in ("encoder_dropout", "post_mlp_dropout", "prenet_dropout")}
        decoder = dataclasses.replace(cfg.model.decoder, input_dropout=0.0)
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, decoder=decoder, **dropped))
        trainer = Trainer(cfg, CPU)
        names = set(trainer.model.state_dict())
        losses = []
        for step in range(1, 5):
            outcome = trainer.step(step, [batch(modality, step, size=3), batch(modality, step, size=3)])
            losses.append(float(torch.stack([*outcome.losses.values()]).sum()))
        curves.append(losses)
        assert names == set(Trainer(cfg, CPU).model.state_dict())
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[1] != [curves[1][0]] * 4
    torch._dynamo.reset()


class NoHostReads(TorchDispatchMode):
    """Fails on every operator whose result the host has to wait for."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique",
               "_unique2", "allclose", "bincount", "repeat_interleave.Tensor")  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        overload = f"{name}.{func._overloadname}"
        # repeat_interleave with tensor counts reads their sum, unless the size of the output is given
        sized = "output_size" in (kwargs or {})
        if name in self.WAITING or (overload in self.WAITING and not sized):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also without what reads a CPU tensor past the dispatcher, where a GPU tensor would be copied."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the host reads a tensor")

    with monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "__array__", "cpu"):
            patch.setattr(Tensor, name, refuse)
        with NoHostReads():
            yield


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
def test_a_step_never_waits_for_the_device(modality: str, bad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if bad and modality == "text":
        pytest.skip("token ids have no NaN")
    trainer = Trainer(quiet(tiny(modality)), CPU, capturable=True)
    for step in (1, 2):
        given = [batch(modality, step, size) for size in (3, 2)]
        if bad and step == 2:
            given[0].source[0] = float("nan")
        with no_host_reads(monkeypatch):
            outcome = trainer.step(step, given)
    assert trainer.count_bad() == ((1, 1) if bad else (0, 0))
    assert bool(outcome.good) is not bad


WAVEFORM = WaveformFront(conv_layers=((8, 10, 5), (8, 3, 2), (8, 2, 2)), position_groups=2)
STEPS: dict[str, tuple[str, Objective, dict[str, Any]]] = {
    "image": ("image", "data2vec2", {"cls_loss": 0.01}),
    "image data2vec1": ("image", "data2vec1", {}),
    "image mae": ("image", "mae", {}),
    "log-mel": ("audio", "data2vec2", {}),
    "log-mel data2vec1": ("audio", "data2vec1", {}),
    "log-mel mae": ("audio", "mae", {}),
    "waveform": ("audio", "data2vec2", {"front": WAVEFORM}),
    "waveform data2vec1": ("audio", "data2vec1", {"front": WAVEFORM}),
    "text": ("text", "data2vec2", {"layerdrop": 0.3, "encoder_dropout": 0.1}),
    "text data2vec1": ("text", "data2vec1", {}),
    "text mlm": ("text", "mlm", {}),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_copies_nothing_to_or_from_the_device(case: str) -> None:
    modality, objective, model = STEPS[case]
    cfg = tiny(modality, model=model, train={"backend": "eager"}, optim={"clip": 1.0})
    trainer = Trainer(for_objective(cfg, objective), META)
    trainer.model.graph_safe = True  # layerdrop that a graph can record
    given = batch(modality, 1, 2)
    if modality != "image":
        source = given.source[:, :4_000]
        padding = torch.zeros(source.shape, dtype=torch.bool)
        padding[1, -source.shape[1] // 4 :] = True
        given = dataclasses.replace(given, source=source, padding_mask=padding)
    given = given.to(META)
    with no_transfers():
        outcome = trainer.step(1, [given])
    assert outcome.good.device == META


@pytest.mark.parametrize("modality", MODALITIES)
def test_batches_are_finished_on_the_device(modality: str, tmp_path: Path) -> None:
    """Cut, flipped, normalised: of the host come the samples alone."""
    cfg = tiny(modality, train={"backend": "eager"})
    pipeline = open_data(make_data(modality, tmp_path / "data"), cfg, device=META, run_dir=tmp_path)
    with no_transfers(inputs=True):
        batches = next(pipeline.micro_batches(Position(), 4))
    assert all(part.source.device == META for part in batches)


META_COPIES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: torch.tensor(1.0, device=META),
    "as_tensor": lambda x: torch.as_tensor([1.0], device=META),
    "new_tensor": lambda x: x.new_tensor([1.0]), "to": lambda x: torch.ones(2).to(META),
    "copy": lambda x: x.copy_(torch.ones(2)), "list": lambda x: x[[0, 1]], "mask": lambda x: x[[True, False]],
    "mixed": lambda x: x * torch.ones(()), "back": lambda x: x.to("cpu", non_blocking=True),
    "from numpy": lambda x: torch.from_numpy(np.ones(2)).to(META), "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0]), "tolist": lambda x: x.tolist(), "numpy": lambda x: x.numpy(),
}  # fmt: skip


@pytest.mark.parametrize("name", META_COPIES)
@pytest.mark.parametrize("inputs", [False, True])
def test_the_watch_sees_copies(name: str, inputs: bool) -> None:
    x = torch.ones(2, device=META)
    with (
        no_transfers(inputs=inputs),
        pytest.raises((AssertionError, NotImplementedError, RuntimeError, TypeError)),
    ):
        META_COPIES[name](x)


def test_the_watch_lets_pass_what_is_made_on_the_device() -> None:
    x = torch.ones(2, device=META)
    with no_transfers():
        y = torch.where(x > 0, x * 2.0, 0.5) + torch.full((), 3.0, device=META) + torch.arange(2, device=META)
        assert torch.as_tensor(y) is y
    with no_transfers(inputs=True):
        assert torch.ones(2).to(META, non_blocking=True).device == META


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.item(), "float": float, "bool": bool, "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0], "equal": lambda x: torch.equal(x, x), "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(), "cpu": lambda x: x.cpu(),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_the_watch_sees_host_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(())
    with pytest.raises(AssertionError, match="waits|reads"), no_host_reads(monkeypatch):
        READS[name](x)


@pytest.mark.parametrize("modality", MODALITIES)
def test_device_decisions_equal_host_decisions(modality: str) -> None:
    # a large eps: the key bias has no gradient but rounding, which Adam would blow up
    cfg = tiny(modality, optim={"eps": 1e-4})
    states = []
    for capturable in (False, True):
        trainer = Trainer(cfg, CPU, capturable=capturable)
        for step in range(1, 5):
            given = batch(modality, step)
            if step == 3 and modality != "text":
                given.source[0] = float("inf")
            trainer.step(step, [given])
        states.append((trainer.model.state_dict(), trainer.count_bad()))
    assert states[0][1] == states[1][1]
    for name, ours in states[0][0].items():
        torch.testing.assert_close(states[1][0][name], ours, rtol=2e-5, atol=2e-6, msg=name)


class FxCapture:
    """In a CUDA graph's place: every operator of the work, recorded with the tensors it touches.

    What the work takes from the host is a constant of the recording, as in a CUDA graph, and as there
    recording changes no state.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.recorded = self.replayed = 0

    def warmup(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def __call__(self, work: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
        state = [*self.trainer.model.state_dict().values(), self.trainer.bad]
        state += [t for fields in self.trainer.optimizer.state.values() for t in fields.values()]
        before, rng = [t.detach().clone() for t in state], torch.get_rng_state()
        kept: list[Outcome] = []

        def flat() -> list[Tensor]:
            kept.append(work())
            return self._tensors(kept[-1])

        recording = make_fx(flat)()
        with torch.no_grad():
            for t, value in zip(state, before, strict=True):
                t.copy_(value)
        torch.set_rng_state(rng)
        outcome = copy.copy(kept[-1])
        outcome.good = torch.zeros((), dtype=torch.bool)
        outcome.losses = {name: torch.zeros(()) for name in outcome.losses}
        outcome.grad_norm, outcome.metrics, outcome.health = torch.zeros(()), {}, {}
        outcome.lr, outcome.decay = torch.zeros(2, dtype=torch.float64)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for ours, value in zip(self._tensors(outcome), recording(), strict=True):
                    ours.copy_(value)

        return replay, outcome

    @staticmethod
    def _tensors(outcome: Outcome) -> list[Tensor]:
        assert isinstance(outcome.lr, Tensor) and isinstance(outcome.decay, Tensor)
        return [outcome.good, outcome.grad_norm, outcome.lr, outcome.decay, *outcome.losses.values()]


def graphed(cfg: Config) -> tuple[Trainer, FxCapture]:
    trainer = Trainer(cfg, CPU, capturable=True)
    trainer.model.graph_safe = True
    capture = FxCapture(trainer)
    trainer.graphs = StepGraphs(trainer, capture)
    return trainer, capture


@pytest.mark.parametrize("modality", MODALITIES)
def test_replayed_steps_equal_plain_ones(modality: str) -> None:
    # a large eps: the key bias has no gradient but rounding, which Adam would blow up
    cfg = quiet(tiny(modality, steps=12, optim={"warmup": 3, "eps": 1e-3}))
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, layerdrop=0.3))
    plain = Trainer(cfg, CPU, capturable=True)
    plain.model.graph_safe = True
    results = []
    for trainer, capture in ((plain, None), graphed(cfg)):
        torch.manual_seed(3)
        seen = []
        for step in range(1, 9):
            given = batch(modality, step, size=3 if step % 2 else 2, epoch=step // 3)
            if step == 8 and modality != "text":
                given.source[0] = float("nan")
            outcome = trainer.step(step, [given])
            seen.append([float(sum(outcome.losses.values())), float(outcome.grad_norm)])
        results.append((seen, trainer.model.state_dict(), trainer.count_bad()))
        if capture is not None:
            assert (capture.recorded, capture.replayed) == (2, 2)
    (ours, state, bad), (theirs, expected, _) = results[1], results[0]
    assert bad == results[0][2] == ((0, 0) if modality == "text" else (1, 1))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6, equal_nan=True)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_replayed_steps_go_on_from_a_checkpoint(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a new trainer, and of one that has graphs of another state."""
    monkeypatch.setattr(cuda_graph, "WARMUP", 1)
    cfg = quiet(tiny("image", steps=12, optim={"eps": 1e-3}))
    saver = Trainer(cfg, CPU, capturable=False)
    for step in (1, 2, 3):
        saver.step(step, [batch("image", step)])
    folder = save_checkpoint(
        tmp_path, 3, saver.model, saver.optimizer_state(), {}, process.capture(CPU), keep=1
    )
    plain = Trainer(cfg, CPU, capturable=True)
    plain.model.graph_safe = True
    fresh, used = graphed(cfg), graphed(cfg)
    for step in (1, 2, 3):
        used[0].step(step, [batch("image", step + 5)])
    assert used[1].replayed == 2
    results = []
    for trainer in (plain, fresh[0], used[0]):
        trainer.load(load_checkpoint(folder))
        for step in range(4, 8):
            assert trainer.step(step, [batch("image", step)]).good
        counts = {float(fields["step"]) for fields in trainer.optimizer.state.values()}
        assert counts == {7}
        results.append(trainer.model.state_dict())
    assert (fresh[1].recorded, fresh[1].replayed) == (1, 3) and (used[1].recorded, used[1].replayed) == (2, 5)
    for state in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_replay_draws_anew_and_follows_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "WARMUP", 1)
    cfg = tiny("image", steps=50, optim={"warmup": 40, "lr": 1e-3})
    trainer, capture = graphed(cfg)
    same = batch("image", 1)
    seen = []
    for step in range(1, 6):
        outcome = trainer.step(step, [dataclasses.replace(same, epoch=step)])
        row, _ = trainer.report(step, outcome)
        seen.append((row["loss_IMAGE_regression"], row["lr"], row["ema_decay"]))
    assert capture.replayed == 4
    losses, rates, decays = zip(*seen, strict=True)
    assert len(set(losses)) == len(set(rates)) == len(set(decays)) == 5
    assert list(rates) == sorted(rates)


def test_no_more_graphs_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "WARMUP", 0)
    monkeypatch.setattr(cuda_graph, "MOST", 1)
    trainer, capture = graphed(tiny("image"))
    for step, size in enumerate((2, 3, 2, 3), 1):
        assert trainer.step(step, [batch("image", step, size)]).good
    assert (capture.recorded, capture.replayed) == (1, 2)


def test_a_cuda_graph_needs_a_gpu(tmp_path: Any) -> None:
    cfg = tiny("image", train={"cuda_graph": True})
    with pytest.raises(ValueError, match=r"config: train\.cuda_graph needs a CUDA GPU, got device cpu"):
        run(cfg, make_data("image", tmp_path / "data"), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_short_options_switch_the_modes() -> None:
    cfg = tiny("image")
    sections = {name: getattr(cfg, name) for name in ("model", "optim", "ema", "data", "train", "probe")}
    given = TrainOptions(compile=True, **sections)
    assert _with_modes(given, cfg) == dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, compile=True)
    )
    assert _with_modes(TrainOptions(**sections), cfg) == cfg


def test_profile_of_compiled_steps(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    cfg = tiny("image", train={"compile": True})
    result = run_profile(cfg, tmp_path, backend="eager", steps=1, batch=2, quick=True)
    torch._dynamo.reset()
    assert result.compile and not result.cuda_graph
    (report,) = result.reports
    assert report.coverage >= 0.98
    named = {row.name for row in report.rows}
    # phases around compiled regions keep their names
    assert {"masks/fwd/eager", "adamw_ema/fwd/eager"} <= named
    assert {"student other", "teacher other", "decoder other"} <= named
    assert "image_tiny, fp32, compile, source" in capsys.readouterr().out


def test_the_backend_of_a_run_is_used() -> None:
    cfg = tiny("image", train={"backend": "eager,masks=eager"}, steps=1)
    with backend_spy() as calls:
        Trainer(cfg, CPU).step(1, [batch("image", 1)])
    assert {name for _, name in calls} == {"eager"}
    for backend, words in (
        ("eagre", "unknown backend 'eagre'"),
        ("eager,mask=eager", "unknown op 'mask'"),
        ("eager,triton", "backends 'eager,triton': two for all ops, 'eager' and 'triton'"),
    ):
        wrong = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, backend=backend))
        with pytest.raises(ValueError, match=words):
            Trainer(wrong, CPU)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--backend", "eager", "--out", "x"], ["--out", "x", "--train.backend", "eager"]),
        (["--backend=triton", "--backend.attention=eager"], ["--train.backend", "triton,attention=eager"]),
        (["--backend.loss", "eager"], ["--train.backend", "loss=eager"]),
        (["--backends", "x", "--train.backend", "eager"], ["--backends", "x", "--train.backend", "eager"]),
    ],
)
def test_backend_options_are_joined(arguments: list[str], expected: list[str]) -> None:
    assert join_backends(arguments, "--train.backend") == expected


def test_a_backend_option_needs_a_name() -> None:
    with pytest.raises(ValueError, match="--backend.loss needs the name of a backend"):
        join_backends(["--backend.loss"], "--train.backend")


def test_waveforms_of_several_lengths_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    cfg = tiny("audio", train={"compile": True})
    front = WaveformFront(conv_layers=((8, 10, 5), (8, 3, 2), (8, 2, 2)), position_groups=2)
    model = dataclasses.replace(cfg.model, front=front, attention_dropout=0.1, layerdrop=0.0)
    trainer = Trainer(dataclasses.replace(cfg, model=model), CPU)
    for step, samples in enumerate((1600, 2000, 2400), 1):
        given = Batch(torch.randn(2, samples), torch.arange(2), 0)
        assert trainer.step(step, [given]).good
    torch._dynamo.reset()
