"""A log line does not hold the steps up: what of it takes long is computed beside them."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from d2v.train.checkpoint import save_checkpoint
from d2v.train.health import measure
from d2v.train.pretrain import run
from d2v.train.progress import Progress, read_metrics
from tests.d2v.tiny_runs import make_data, tiny


def test_steps_go_on_while_the_rest_of_a_line_is_computed(tmp_path):
    steps_done, screen = threading.Event(), io.StringIO()

    def rest():
        assert steps_done.wait(60)
        return {"front_rank": 3.0, "skipped": 0}, ["warning: low"]

    with Progress(tmp_path, start=0, steps=9, unit="images", stream=screen) as progress:
        progress.log({"step": 1, "loss": 0.5}, rest)
        progress.tick(2, 8)
        progress.tick(3, 8)
        assert read_metrics(tmp_path) == []
        steps_done.set()
        progress.say("step 3: bad")
        row = read_metrics(tmp_path)[0]
        assert list(row) == ["step", "loss", "front_rank", "skipped", "samples_per_s", "seconds"]
        assert row["samples_per_s"] == 0.0  # as it was at the step
        steps_done.clear()
        progress.log({"step": 4, "loss": 0.25}, rest)
        threading.Timer(0.01, steps_done.set).start()
        progress.note({"step": 4, "probe": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4, 4]
    assert [line.split(" |")[0] for line in screen.getvalue().splitlines()] == [
        "step 1/9", "warning: low", "step 3: bad", "step 4/9", "warning: low",
    ]  # fmt: skip


def test_a_line_that_waits_is_written_whatever_ends_the_run(tmp_path):
    with pytest.raises(KeyError), Progress(tmp_path, start=0, steps=9, unit="images") as progress:
        progress.log({"step": 1, "loss": 0.5}, lambda: ({"skipped": 0}, []))
        raise KeyError
    assert [row["skipped"] for row in read_metrics(tmp_path)] == [0]

    def broken():
        raise ArithmeticError("no rank")

    progress = Progress(tmp_path, start=0, steps=9, unit="images")
    with pytest.raises(ArithmeticError, match="no rank"), progress:
        progress.log({"step": 1, "loss": 0.5}, broken)


def test_a_log_line_takes_one_thread_and_no_other_threads(tmp_path):
    before = torch.get_num_threads()
    seen = []

    def threads():
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        return {}, []

    try:
        torch.set_num_threads(3)
        with Progress(tmp_path, start=0, steps=9, unit="images") as progress:
            progress.log({"step": 1, "loss": 0.5}, threads)
            progress.log({"step": 2, "loss": 0.5}, threads)
            assert torch.get_num_threads() == 3
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [("log line_0", 1)] * 2


@pytest.mark.usefixtures("no_plots")
def test_ranks_are_not_computed_by_the_thread_that_steps_and_stand_before_a_checkpoint(tmp_path, monkeypatch):
    threads, saved = [], []

    def watched(rows):
        threads.append(threading.current_thread().name)
        return measure(rows)

    def save(out, step, *args, **kwargs):
        saved.append((step, [row["step"] for row in read_metrics(out)]))
        return save_checkpoint(out, step, *args, **kwargs)

    monkeypatch.setattr("d2v.train.pretrain_step.measure", watched)
    monkeypatch.setattr("d2v.train.loop.save_checkpoint", save)
    images = make_data("image", tmp_path / "images")
    run(tiny("image", steps=4, train={"save_every": 2}), images, tmp_path / "r")
    assert threads == ["log line_0"] * 4
    assert saved == [(2, [1, 2]), (4, [1, 2, 3, 4])]
