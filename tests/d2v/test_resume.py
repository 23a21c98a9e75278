"""A stopped and resumed run is the unbroken one, bit for bit: weights, teacher, optimizer, random states."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from d2v.cli.main import main
from d2v.config.toml import CheckpointError, read_config, write_config
from d2v.data.loader import keyed
from d2v.data.open import open_data
from d2v.data.types import Position
from d2v.train import process
from d2v.train.checkpoint import latest_checkpoint, load_checkpoint
from d2v.train.learner import Learner
from d2v.train.pretrain import run
from d2v.train.pretrain_step import Trainer
from d2v.train.progress import METRICS, TIMING, read_metrics, truncate_metrics
from tests.d2v.tiny_runs import make_data, tiny

pytestmark = pytest.mark.usefixtures("no_plots")

CPU = torch.device("cpu")
RANDOM = {"encoder_dropout": 0.1, "attention_dropout": 0.1, "post_mlp_dropout": 0.1, "layerdrop": 0.3}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_data("image", tmp_path_factory.mktemp("images"))


def assert_same_run(a, b):
    """The last checkpoints are equal in every tensor and count, and so are the metrics."""
    one, two = latest_checkpoint(a), latest_checkpoint(b)
    assert one.name == two.name
    files = sorted(p.name for p in one.glob("*.safetensors"))
    assert files == ["model.safetensors", "optimizer.safetensors", "rng.safetensors"]
    for name in files:
        x, y = (safetensors.torch.load_file(folder / name) for folder in (one, two))
        assert x.keys() == y.keys()
        assert [key for key in x if not torch.equal(x[key].nan_to_num(), y[key].nan_to_num())] == []
    states = [json.loads((folder / "state.json").read_text())["trainer"] for folder in (one, two)]
    assert states[0] == states[1]
    rows = [
        [{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(run)] for run in (a, b)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("modality", "workers", "model"),
    [
        ("image", 0, RANDOM),
        ("image", 2, {}),
        ("audio", 0, RANDOM),
        ("audio", 2, {}),
        ("text", 0, RANDOM),
        ("text", 2, {}),
    ],
)
def test_resumed_runs_are_bitwise_the_unbroken_one(capturable, modality, workers, model, tmp_path):
    """Stopped twice: inside the first epoch and, where the data are few, after it."""
    data = make_data(modality, tmp_path / "data")
    cfg = tiny(modality, steps=9, model=model, data={"workers": workers}, train={"log_every": 2})
    whole = run(cfg, data, tmp_path / "whole")
    assert whole.finished
    for last in (3, 7):
        part = run(cfg, data, tmp_path / "parts", resume=last > 3, stop=lambda step, last=last: step == last)
        assert (part.step, part.finished, part.exit_code) == (last, False, 0)
    assert run(cfg, data, tmp_path / "parts", resume=True).finished
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_goes_on_on_another_kind_of_device(capturable, tmp_path, images, monkeypatch):
    """Saved on a GPU and continued on a CPU, or the other way round: the counts move, the sums round anew."""
    cfg = tiny("image", steps=6, optim={"eps": 1e-4})  # the key bias has no gradient but rounding
    run(cfg, images, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "decides_on", staticmethod(lambda device: not capturable))
        run(cfg, images, tmp_path / "parts", stop=lambda step: step == 3)
    assert run(cfg, images, tmp_path / "parts", resume=True).finished
    whole, parts = (
        {
            f"{file}/{name}": tensor
            for file in ("model", "optimizer")
            for name, tensor in safetensors.torch.load_file(
                latest_checkpoint(tmp_path / out) / f"{file}.safetensors"
            ).items()
        }
        for out in ("whole", "parts")
    )
    assert {float(t) for name, t in parts.items() if name.endswith(".step")} == {6}
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_trainer_that_has_stepped_loads_a_checkpoint(capturable, tmp_path, images):
    """Nothing of what it was before shows, and it says which state it has no parameter for."""
    cfg = tiny("image", steps=8)
    run(cfg, images, tmp_path / "r", stop=lambda step: step == 3)
    checkpoint = load_checkpoint(latest_checkpoint(tmp_path / "r"))
    stream = open_data(images, cfg, device=CPU, run_dir=tmp_path / "r").micro_batches(Position(), 8)
    batches = [next(stream) for _ in range(4)]
    states = []
    for before in (0, 2):
        trainer = Trainer(cfg, CPU)
        for number in range(before):
            trainer.step(number + 1, batches[number])
        trainer.load(checkpoint)
        assert {float(trainer.optimizer.state[p]["step"]) for p in trainer.parameters} == {3}
        for number in (4, 5):
            trainer.step(number, batches[number - 2])
        states.append(trainer)
    fresh, used = states
    for name, p in fresh.model.state_dict().items():
        assert torch.equal(p, used.model.state_dict()[name]), name
    stranger = dataclasses.replace(checkpoint, optimizer={"decoder.x": {}, **checkpoint.optimizer})
    with pytest.raises(CheckpointError, match=r"optimizer state of decoder\.x, which is not trained"):
        fresh.load(stranger)


def test_dropout_really_draws(tmp_path, images):
    """The test above can fail: another seed, and another dropout, give another run."""
    losses = {}
    for name, cfg in {
        "plain": tiny("image", steps=3),
        "dropout": tiny("image", steps=3, model=RANDOM),
        "seed": tiny("image", steps=3, train={"seed": 2}),
    }.items():
        losses[name] = tuple(row["loss"] for row in run(cfg, images, tmp_path / name).metrics)
    assert len(set(losses.values())) == 3


def test_the_number_of_workers_changes_nothing(tmp_path, images):
    for workers in (0, 2):
        run(tiny("image", steps=3, data={"workers": workers}), images, tmp_path / str(workers))
    assert_same_run(tmp_path / "0", tmp_path / "2")


def test_micro_batches_are_kept_over_a_resume(capturable, tmp_path, monkeypatch, images):
    """They follow the free memory, and another split of the batch would round differently."""
    cfg = tiny("image", steps=4, train={"precision": "bf16"})
    monkeypatch.setattr("d2v.train.pretrain.micro_batch", lambda *_: 3)
    run(cfg, images, tmp_path / "whole")
    run(cfg, images, tmp_path / "parts", stop=lambda step: step == 2)
    monkeypatch.undo()
    run(cfg, images, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_what_was_logged_after_the_checkpoint_is_written_again(capturable, tmp_path, images):
    """A run killed between checkpoints left lines that the resumed one repeats."""
    cfg = tiny("image", steps=5, train={"save_every": 2})
    run(cfg, images, tmp_path / "r")
    whole = read_metrics(tmp_path / "r")
    newest = latest_checkpoint(tmp_path / "r")
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    with (tmp_path / "r" / METRICS).open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = run(cfg, images, tmp_path / "r", resume=True)
    assert [(r["step"], r["loss"]) for r in resumed.metrics] == [(r["step"], r["loss"]) for r in whole]


def test_a_run_killed_before_its_first_checkpoint_starts_again(capturable, tmp_path, images):
    cfg = tiny("image", steps=2)
    run(cfg, images, tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    write_config(tmp_path / "killed", cfg, images)
    run(cfg, images, tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_run_stays_as_it_is(capturable, tmp_path, images):
    cfg = tiny("image", steps=2)
    run(cfg, images, tmp_path / "r")
    before = (tmp_path / "r" / METRICS).read_bytes()
    again = run(cfg, images, tmp_path / "r", resume=True)
    assert (again.step, again.finished, again.exit_code) == (2, True, 0)
    assert (tmp_path / "r" / METRICS).read_bytes() == before


def test_changed_maths_are_refused_with_both_values(tmp_path, capsys, images):
    cfg = tiny("image", steps=4)
    run(cfg, images, tmp_path / "r", stop=lambda step: step == 2)
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    changes = [
        "--optim.lr",
        "0.5",
        "--train.steps",
        "8",
        "--model.mask.clones",
        "2",
        "--train.log-every",
        "3",
    ]
    assert main(["train", "--resume", str(tmp_path / "r"), *changes]) == 2
    err = capsys.readouterr().err
    for line in (
        "optim.lr: 0.005 -> 0.5",
        "train.steps: 4 -> 8",
        "model.mask.clones: 8 -> 2",
    ):
        assert line in err
    assert "log_every" not in err
    assert {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()} == before


def test_data_may_move_but_not_change(capturable, tmp_path):
    make_data("text", tmp_path / "before")
    cfg = tiny("text", steps=4)
    run(cfg, make_data("text", tmp_path / "whole_data"), tmp_path / "whole")
    run(cfg, str(tmp_path / "before"), tmp_path / "parts", stop=lambda step: step == 2)
    (tmp_path / "before").rename(tmp_path / "after")
    with pytest.raises(ValueError, match="before does not exist"):
        run(cfg, str(tmp_path / "before"), tmp_path / "parts", resume=True)
    run(cfg, str(tmp_path / "after"), tmp_path / "parts", resume=True, stop=lambda step: step == 3)
    (tmp_path / "after" / "new.txt").write_text("something the run has not seen\n" * 40)
    with pytest.raises(ValueError, match="can only be resumed on the same data"):
        run(cfg, str(tmp_path / "after"), tmp_path / "parts", resume=True)
    (tmp_path / "after" / "new.txt").unlink()
    run(cfg, str(tmp_path / "after"), tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert read_config(tmp_path / "parts")[1] == str(tmp_path / "after")


def test_what_does_not_change_the_maths_may_change(capturable, tmp_path, images):
    cfg = tiny("image", steps=4)
    run(cfg, images, tmp_path / "whole")
    run(cfg, images, tmp_path / "parts", stop=lambda step: step == 2)
    assert (
        main(
            ["train", "--resume", str(tmp_path / "parts"), "--train.save-every", "1", "--data.prefetch", "4"]
        )
        == 0
    )
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert read_config(tmp_path / "parts")[0].train.save_every == 1


PROGRAM = """
import sys
from d2v.cli.main import main
from d2v.train.learner import Learner
Learner.decides_on = staticmethod(lambda device: {capturable})
sys.exit(main())
"""


def start(out, cfg, data, workers, capturable):
    """`d2v train --resume` of a run with nothing but its config, in a process group, at line 3 of its log."""
    out.mkdir()
    write_config(out, dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, workers=workers)), data)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(capturable=capturable), "train", "--resume", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / METRICS).exists() or (out / METRICS).read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "workers", "capturable"),
    [(signal.SIGTERM, 0, True), (signal.SIGINT, 2, False)],
    indirect=["capturable"],
)
def test_a_signal_saves_prints_the_resume_line_and_exits_0(capturable, number, workers, tmp_path, images):
    """Ctrl-C reaches the whole process group, loader workers included."""
    cfg = tiny("image", steps=400, model=RANDOM)
    process = start(tmp_path / "r", cfg, images, workers, capturable)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    step = int(latest_checkpoint(tmp_path / "r").name.removeprefix("step_"))
    assert 3 <= step < 400
    assert f"stopped by {number.name} at step {step}; saved. Continue:" in out
    assert out.endswith(f"  d2v train --resume {tmp_path / 'r'}\n")
    assert [row["step"] for row in read_metrics(tmp_path / "r")] == list(range(1, step + 1))
    if number == signal.SIGTERM:
        until = step + 3
        run(cfg, images, tmp_path / "r", resume=True, stop=lambda done: done == until)
        run(cfg, images, tmp_path / "whole", stop=lambda done: done == until)
        assert_same_run(tmp_path / "whole", tmp_path / "r")


def test_slurms_warning_signal_stops_a_run_too(tmp_path, capsys, images):
    result = run(
        tiny("image"),
        images,
        tmp_path / "r",
        stop=lambda step: bool(step == 2 and signal.raise_signal(signal.SIGUSR1)),
    )
    assert (result.step, result.finished, result.exit_code) == (2, False, 0)
    assert "stopped by SIGUSR1 at step 2" in capsys.readouterr().out


def test_a_second_ctrl_c_exits_at_once():
    from d2v.train.process import StopRequest

    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        assert request.name is None
        signal.raise_signal(signal.SIGINT)
        assert request.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_after_sigterm_exits_at_once_but_sigterm_twice_does_not():
    from d2v.train.process import StopRequest

    with StopRequest() as request:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert request.name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_random_states_are_restored_exactly():
    import random

    import numpy as np

    def draw():
        return torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1), random.random()

    cpu = torch.device("cpu")
    process.seed_all(7)
    draw()  # leaves half a Gaussian pair in numpy and Python
    states = process.capture(cpu)
    first = draw()
    draw()
    process.restore(states, cpu)
    assert draw() == first
    process.seed_all(7)
    draw()
    assert draw() == first


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_keyed_draws_depend_on_their_seed_alone_and_leave_no_trace(device):
    device = torch.device(device)

    def draw():
        return torch.rand(3).tolist(), torch.rand(3, device=device).tolist()

    process.seed_all(1)
    untouched = draw(), draw()
    found = []
    for seed in (1, 2):
        process.seed_all(seed)
        before = draw()
        with keyed(2**63 - 1, device):
            found.append(draw())
        if seed == 1:
            assert (before, draw()) == untouched
    assert found[0] == found[1] != before
    with keyed(0, device):
        assert draw() != found[0]


def test_truncating_keeps_the_lines_up_to_a_step(tmp_path):
    truncate_metrics(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / METRICS).write_text("".join(f'{{"step": {s}}}\n' for s in (2, 4, 6)))
    truncate_metrics(tmp_path, 4)
    assert read_metrics(tmp_path) == [{"step": 2}, {"step": 4}]
