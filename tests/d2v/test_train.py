"""The trainer's step, its log and its refusals, on real models shrunk to width 16."""

import contextlib
import dataclasses
import io
import json
import math
import resource

import pytest
import torch

import d2v.train.pretrain
from d2v.config.objectives import for_objective
from d2v.config.toml import CheckpointError, read_config
from d2v.data.open import open_data
from d2v.data.types import DataError, Position
from d2v.train.checkpoint import latest_checkpoint, load_checkpoint
from d2v.train.loop import RunError
from d2v.train.optim import learning_rate, teacher_decay
from d2v.train.pretrain import run
from d2v.train.pretrain_step import Trainer
from d2v.train.progress import Progress, duration, read_metrics
from tests.d2v.tiny_runs import make_data, tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_data("image", tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def datasets(images, tmp_path_factory):
    return {"image": images} | {n: make_data(n, tmp_path_factory.mktemp(n)) for n in ("audio", "text")}


def batches_of(images, cfg, count, micro=None):
    """Micro-batches of the first `count` global steps."""
    stream = open_data(images, cfg, device=CPU).micro_batches(Position(), micro or cfg.data.batch)
    return [next(stream) for _ in range(count)]


def state(trainer):
    """A copy of everything a step may change."""
    moments = {f"{n}.{k}": v for n, s in trainer.optimizer_state().items() for k, v in s.items()}
    return {k: v.clone() for k, v in {**trainer.model.state_dict(), **moments}.items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_a_run_leaves_a_whole_directory(modality, tmp_path, capsys):
    cfg = tiny(modality, steps=4, train={"save_every": 2, "keep": 1, "log_every": 2})
    data = make_data(modality, tmp_path / "data")
    result = run(cfg, data, tmp_path / "r")
    assert (result.step, result.finished, result.exit_code) == (4, True, 0)
    assert [row["step"] for row in result.metrics] == [2, 4]
    for row in result.metrics:
        parts = [value for key, value in row.items() if key.startswith("loss_")]
        assert row["loss"] == pytest.approx(sum(parts)) and row["loss"] > 0
        assert row["lr"] == learning_rate(cfg.optim, row["step"] - 1, 4)
        assert row["ema_decay"] == teacher_decay(cfg.ema, row["step"])
        for part in ("front", "pred", "target"):
            assert row[f"{part}_var"] > 0
            assert 1 <= row[f"{part}_rank"] <= 16 * 8
        assert row["grad_norm"] > 0 and row["samples_per_s"] > 0
        assert (row["alarms"], row["skipped"]) == ([], 0)
    assert read_config(tmp_path / "r") == (cfg, data)
    assert json.loads((tmp_path / "r" / "env.json").read_text())["torch"] == torch.__version__
    record = json.loads((tmp_path / "r" / "data.json").read_text())
    assert (record["path"], record["unreadable"]) == (data, {})
    assert record["total"] > 0 and "meta" in record
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step_4"]
    assert (tmp_path / "r" / "plots" / "loss.png").exists()
    out = capsys.readouterr().out
    assert "= 1 process x 1 micro-batch of" in out
    assert "step 4/4 | loss " in out


def test_bf16_trains_and_keeps_fp32_weights(tmp_path, images):
    result = run(tiny("image", steps=2, train={"precision": "bf16"}), images, tmp_path / "r")
    weights = load_checkpoint(latest_checkpoint(tmp_path / "r")).model
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}
    assert all(math.isfinite(row["loss"]) for row in result.metrics)


def test_the_loss_falls(tmp_path, images):
    rows = run(tiny("image", steps=60, optim={"lr": 5e-3}), images, tmp_path / "r").metrics
    first, last = (sum(row["loss"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < 0.8 * first


def test_micro_batches_give_the_gradient_of_the_whole_batch(images):
    # noise at masked places is drawn per micro-batch, so it must be off to compare
    cfg = tiny("image", batch=8)
    quiet = dataclasses.replace(cfg.model, decoder=dataclasses.replace(cfg.model.decoder, noise_std=0.0))
    cfg = dataclasses.replace(cfg, model=quiet)
    outcomes = []
    for micro in (8, 3, 1):
        trainer = Trainer(cfg, CPU)
        (batches,) = batches_of(images, cfg, 1, micro)
        assert [len(b) for b in batches] == {8: [8], 3: [3, 3, 2], 1: [1] * 8}[micro]
        outcomes.append(trainer.step(2, batches))
    whole, *split = outcomes
    for other in split:
        assert other.losses["IMAGE_regression"].item() == pytest.approx(
            whole.losses["IMAGE_regression"].item(), rel=1e-5
        )
        assert other.metrics.keys() == whole.metrics.keys()


SPLIT = {
    "image": ("image", "data2vec2", {"crop_scale": (0.3, 1.0), "flip": True}),
    "image, data2vec1": ("image", "data2vec1", {"crop_scale": (0.3, 1.0), "flip": True}),
    "image, mae": ("image", "mae", {}),
    "audio": ("audio", "data2vec2", {}),
    "audio, padded": ("audio", "data2vec2", {"pad": True}),
    "audio, mae": ("audio", "mae", {}),
    "text": ("text", "data2vec2", {}),
    "text, data2vec1": ("text", "data2vec1", {}),
    "text, mlm": ("text", "mlm", {}),
}


@pytest.mark.parametrize("case", SPLIT)
def test_a_step_does_not_depend_on_the_micro_batch(case, datasets, monkeypatch):
    """Inputs and masks bit for bit, gradients to rounding, but of mlm, which draws tokens forward by forward.

    Noise at masked places is drawn so too: it is off here.
    """
    modality, objective, data = SPLIT[case]
    cfg = for_objective(tiny(modality), objective)
    quiet = dataclasses.replace(cfg.model, decoder=dataclasses.replace(cfg.model.decoder, noise_std=0.0))
    if case == "image":
        quiet = dataclasses.replace(quiet, cls_loss=0.01)
    cfg = dataclasses.replace(cfg, model=quiet, data=dataclasses.replace(cfg.data, batch=6, **data))
    runs = []
    for seed, micro in enumerate((6, 2, 1)):
        trainer = Trainer(cfg, CPU)
        torch.manual_seed(seed)  # as if other numbers of forward passes had been made
        monkeypatch.setattr(trainer.optimizer, "step", lambda **_: None)
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda **_: None)
        _, batches = batches_of(datasets[modality], cfg, 2, micro)
        assert len(batches) >= {6: 1, 2: 2, 1: 4}[micro]
        trainer.step(1, batches)
        plans = [trainer.model.sample_masks(b.source, b.ids, epoch=b.epoch, seed=1) for b in batches]
        seen = torch.cat([b.source for b in batches]), torch.cat([plan.mask for plan in plans])
        gradient = torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])
        runs.append((*seen, gradient))
    (source, mask, gradient), *others = runs
    for other in others:
        assert torch.equal(other[0], source) and torch.equal(other[1], mask)
        if objective != "mlm":
            assert (other[2] - gradient).norm() < 1e-4 * gradient.norm()


def test_the_step_is_the_documented_one(images):
    """Against the model's own loss, torch's clipping and the teacher's definition, by hand."""
    cfg = tiny("image", optim={"clip": 0.01, "weight_decay": 0.0, "warmup": 0}, batch=4)
    trainer, by_hand = Trainer(cfg, CPU), Trainer(cfg, CPU)
    (batches,) = batches_of(images, cfg, 1)
    batch = batches[0]
    torch.manual_seed(5)
    outcome = trainer.step(1, batches)
    torch.manual_seed(5)
    out = by_hand.model(batch.source, ids=batch.ids, epoch=batch.epoch, seed=cfg.train.seed)
    out.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters, cfg.optim.clip)
    assert sum(outcome.losses.values()).item() == pytest.approx(out.loss.item(), rel=1e-6)
    assert outcome.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    before = {n: t.clone() for n, t in by_hand.model.state_dict().items()}
    after = trainer.model.state_dict()
    decay = teacher_decay(cfg.ema, 1)
    moved = 0
    for name, p in by_hand.model.named_parameters():
        if p.grad is None or not p.requires_grad:
            continue
        # Adam's first step is lr * g / (|g| + eps')
        eps = cfg.optim.eps / math.sqrt(1 - cfg.optim.betas[1])
        expected = before[name] - cfg.optim.lr * p.grad / (p.grad.abs() + eps)
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)
        if f"_ema.{name}" in after:
            teacher = decay * before[f"_ema.{name}"] + (1 - decay) * after[name]
            torch.testing.assert_close(after[f"_ema.{name}"], teacher, rtol=1e-5, atol=1e-7)
            moved += 1
    assert moved > 10


def test_the_phases_of_a_step_are_marked_for_profilers(monkeypatch, images):
    cfg = tiny("image", batch=4)
    (batches,) = batches_of(images, cfg, 1, micro=2)
    phases = []
    monkeypatch.setattr(
        "d2v.train.pretrain_step.phase", lambda name: phases.append(name) or contextlib.nullcontext()
    )
    Trainer(cfg, CPU).step(1, batches)
    assert phases == ["masks", *["forward", "backward", "loss"] * 2, "optimizer"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_leaves_everything_as_it_was(value, images):
    cfg = tiny("image")
    trainer = Trainer(cfg, CPU)
    good, bad, again = batches_of(images, cfg, 3)
    trainer.step(1, good)
    before = state(trainer)
    bad[0].source[0, 0, 3, 3] = value
    outcome = trainer.step(2, bad)
    assert not outcome.good
    assert_equal_states(before, state(trainer))
    assert all(p.grad is None for p in trainer.parameters)
    row, health = trainer.report(2, outcome)
    assert not math.isfinite(row["loss"])
    columns, alarms = health()
    assert (columns["alarms"], alarms) == ([], [])
    assert trainer.step(3, again).good
    assert any(not torch.equal(v, before[k]) for k, v in state(trainer).items())


def spoil(monkeypatch, bad_steps):
    """NaN in the images of these global steps, counted from 1."""

    def opened(*args, **kwargs):
        pipeline = open_data(*args, **kwargs)
        original = pipeline.micro_batches

        def micro_batches(start, micro):
            for number, batches in enumerate(original(start, micro), start.step_in_epoch + 1):
                if number in bad_steps:
                    batches[0].source.fill_(float("nan"))
                yield batches

        pipeline.micro_batches = micro_batches
        return pipeline

    monkeypatch.setattr(d2v.train.pretrain, "open_data", opened)


def test_bad_steps_are_skipped_and_reported(tmp_path, monkeypatch, capsys, images):
    spoil(monkeypatch, {2, 3, 5})
    result = run(tiny("image", steps=6, train={"log_every": 6, "max_bad_steps": 3}), images, tmp_path / "r")
    assert (result.finished, result.exit_code) == (True, 0)
    assert [(row["step"], row["loss"] is None, row["skipped"]) for row in result.metrics] == [
        (2, True, 1), (3, True, 2), (5, True, 3), (6, False, 3),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("is NaN or inf: skipped, nothing was updated") == 3


def test_too_many_bad_steps_stop_the_run_and_keep_what_was_learned(tmp_path, monkeypatch, capsys, images):
    cfg = tiny("image", steps=9, train={"max_bad_steps": 3, "save_every": 2})
    run(cfg, images, tmp_path / "whole", stop=lambda step: step == 3)
    spoil(monkeypatch, {4, 5, 6})
    result = run(cfg, images, tmp_path / "r")
    assert (result.step, result.finished, result.exit_code) == (6, False, 1)
    assert "3 bad steps in a row (train.max_bad_steps)" in capsys.readouterr().out
    good, kept = (load_checkpoint(latest_checkpoint(tmp_path / name)) for name in ("whole", "r"))
    assert_equal_states(good.model, kept.model)
    monkeypatch.undo()
    resumed = run(cfg, images, tmp_path / "r", resume=True)
    assert (resumed.finished, resumed.exit_code) == (True, 0)


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_an_empty_folder_is_refused_and_nothing_is_left(modality, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="data"):
        run(tiny(modality), str(tmp_path / "data"), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_batch_larger_than_the_data_is_refused_before_the_first_step(tmp_path, images):
    with pytest.raises(DataError, match=r"data\.batch"):
        run(tiny("image", batch=10**7, train={"micro_batch": 8}), images, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_an_existing_run_or_folder_or_file_is_refused(tmp_path, images):
    cfg = tiny("image", steps=1)
    run(cfg, images, tmp_path / "r")
    before = sorted(p.name for p in (tmp_path / "r").iterdir())
    with pytest.raises(ValueError, match="holds a run already: continue it with `d2v train --resume"):
        run(tiny("image", steps=2), images, tmp_path / "r")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run(cfg, images, tmp_path / "full")
    with pytest.raises(ValueError, match="is a file"):
        run(cfg, images, tmp_path / "full" / "thesis.txt")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(tmp_path, images):
    """A file size limit fails the write as a full disk does, in the middle."""
    cfg = tiny("image", steps=6, train={"save_every": 2, "keep": 1})
    whole = run(cfg, images, tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))
        return False

    try:
        with pytest.raises(
            RunError, match=r"(?i)step 4: .*step_4.*too large.*continue with `d2v train --resume"
        ):
            run(cfg, images, tmp_path / "r", stop=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step_2"]
    resumed = run(cfg, images, tmp_path / "r", resume=True)
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in whole.metrics]


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["half", "flip"])
def test_a_damaged_checkpoint_is_refused_by_name(file, damage, tmp_path, images):
    cfg = tiny("image", steps=4, train={"save_every": 2})
    run(cfg, images, tmp_path / "r", stop=lambda step: step == 3)
    path = tmp_path / "r" / "checkpoints" / "step_3" / file
    content = bytearray(path.read_bytes())
    if damage == "half":
        content = content[: len(content) // 2]
    else:
        content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file}.*step_2"):
        run(cfg, images, tmp_path / "r", resume=True)
    assert (tmp_path / "r" / "metrics.jsonl").read_text().count("\n") == 3


def test_data_that_gives_out_saves_what_was_trained(tmp_path, monkeypatch, images):
    def opened(*args, **kwargs):
        pipeline = open_data(*args, **kwargs)
        original = pipeline.micro_batches

        def micro_batches(start, micro):
            for number, batches in enumerate(original(start, micro)):
                if number == 3:
                    raise DataError("data: 40 of 100 samples unreadable")
                yield batches

        pipeline.micro_batches = micro_batches
        return pipeline

    monkeypatch.setattr(d2v.train.pretrain, "open_data", opened)
    with pytest.raises(
        RunError, match=r"step 4: data: 40 of 100 samples unreadable(?s:.)*saved: continue with"
    ):
        run(tiny("image"), images, tmp_path / "r")
    assert load_checkpoint(latest_checkpoint(tmp_path / "r")).step == 3


def test_an_unreadable_file_is_named_once_and_recorded(tmp_path, capsys):
    data = make_data("audio", tmp_path / "data")
    good = (tmp_path / "data" / "00.wav").read_bytes()
    for number in range(24, 150):
        (tmp_path / "data" / f"{number}.wav").write_bytes(good)
    (tmp_path / "data" / "07.wav").write_bytes(good[: len(good) // 2])
    run(tiny("audio", steps=30, batch=8), data, tmp_path / "r")
    assert capsys.readouterr().out.count("07.wav") == 1
    record = json.loads((tmp_path / "r" / "data.json").read_text())
    assert [name.rpartition("/")[2] for name in record["unreadable"]] == ["07.wav"]


def test_a_live_line_on_a_terminal(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    with Progress(tmp_path, start=0, steps=2_000, unit="images", stream=screen) as progress:
        progress.say("a [warning] with brackets")
        progress.tick(1, 8)
        progress.log({"step": 1, "loss": 0.5, "target_var": 0.25, "lr": 1e-3})
        progress.tick(2, 8)
    shown = screen.getvalue()
    assert "a [warning] with brackets\n" in shown
    assert "step 2/2,000 | loss 0.5000 | target var 0.25" in shown
    assert read_metrics(tmp_path)[0]["loss"] == 0.5


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7s"), (60, "1m00s"), (245, "4m05s"), (11_520, "3h12m"), (math.inf, "?")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_alarms_are_logged_and_printed_once_in_a_while(tmp_path, capsys, images):
    cfg = tiny("image", steps=14, train={"alarm_after": 2, "min_rank": 0.99, "min_variance": 0.0})
    rows = run(cfg, images, tmp_path / "r").metrics
    assert [bool(row["alarms"]) for row in rows] == [False] * 2 + [True] * 12
    kinds = {kind for row in rows for kind in row["alarms"]}
    assert kinds == {"front_rank", "pred_rank", "target_rank"}
    assert capsys.readouterr().out.count("front end rank") == 2


def test_metrics_of_a_killed_run_can_still_be_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnoise\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2"):
        read_metrics(tmp_path)
