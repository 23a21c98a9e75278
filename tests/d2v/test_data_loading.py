"""The machinery under every data set: order, resuming, workers, bad samples."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import d2v
from d2v.config.run import DataConfig
from d2v.data.loader import AUGMENT, PIECES, Loader, Source, generator, windows
from d2v.data.types import Batch, DataError, Position, Report, Unreadable


class Numbers(Source):
    """Sample i is the number i plus a fraction drawn from its augmentation stream."""

    def __init__(
        self, count: int = 20, batch: int = 6, bad: tuple[int, ...] = (), seed: int = 3, window: int = 0
    ) -> None:
        super().__init__("numbers", seed, batch, window)
        self.count = count
        self.bad = bad

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"number {index}"

    def read(self, index: int, epoch: int | None) -> float:
        if index in self.bad:
            raise Unreadable("is odd")
        return index + (0 if epoch is None else generator(self.seed, AUGMENT, epoch, index).uniform())

    def collate(self, items: list[float], ids: np.ndarray, epoch: int | None) -> Batch:
        return Batch(torch.tensor(items, dtype=torch.float64), torch.from_numpy(ids), epoch or 0)


START = Position()


def loader(source: Source, **cfg) -> Loader:
    return Loader(source, DataConfig(**cfg), torch.device("cpu"))


def take(pipeline: Loader, steps: int, start: Position = START, micro: int = 6) -> list[torch.Tensor]:
    stream = pipeline.micro_batches(start, micro)
    return [torch.cat([b.source for b in step]) for step in itertools.islice(stream, steps)]


def test_epochs_are_permutations_that_differ_and_drop_the_ragged_end():
    steps = take(loader(Numbers()), 6)
    first, second = (torch.cat(steps[i : i + 3]).floor().long().tolist() for i in (0, 3))
    assert len(set(first)) == len(set(second)) == 18
    assert first != second
    assert take(loader(Numbers(seed=4)), 1)[0].tolist() != steps[0].tolist()


def test_resuming_at_any_position_continues_exactly():
    whole = loader(Numbers())
    expected, positions = [], [Position()]
    for step in itertools.islice(whole.micro_batches(Position(), 4), 8):
        expected.append(torch.cat([b.source for b in step]))
        positions.append(Position(*json.loads(json.dumps(whole.position))))
    assert positions[3] == (1, 0) and positions[4] == (1, 1)
    for done, position in enumerate(positions[:-1]):
        rest = take(loader(Numbers()), 8 - done, position)
        for a, b in zip(rest, expected[done:], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("count", [1, 2, 17, 1_000])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 999, 1_000, 5_000])
def test_windows_hold_every_sample_once_and_few_pieces(count: int, window: int) -> None:
    orders = []
    for seed in (0, 0, 1):
        found = windows(np.random.default_rng(seed), count, window)
        assert [len(some) for some in found[:-1]] == [window] * (len(found) - 1)
        assert 0 < len(found[-1]) <= max(window, 1)
        assert sorted(np.concatenate(found).tolist()) == list(range(count))
        for some in found:  # pieces that were cut by a window's or the data set's ends count as well
            assert int((np.diff(np.sort(some)) != 1).sum()) + 1 <= PIECES + 2
        orders.append(np.concatenate(found).tolist())
    assert orders[0] == orders[1]
    assert (orders[0] != orders[2]) == (window < count and count > 2)


def test_a_window_is_shuffled_differs_by_epoch_and_resumes() -> None:
    whole = loader(Numbers(count=300, window=64))
    steps = take(whole, 100)
    epochs = [torch.cat(steps[i : i + 50]).floor().long().tolist() for i in (0, 50)]
    assert all(sorted(ids) == list(range(300)) for ids in epochs) and epochs[0] != epochs[1]
    assert sorted(epochs[0][:64]) != list(range(64)) and epochs[0][:64] != sorted(epochs[0][:64])
    for done in (1, 49, 50, 73):
        rest = take(loader(Numbers(count=300, window=64)), 100 - done, Position(*divmod(done, 50)), micro=4)
        assert all(torch.equal(a, b) for a, b in zip(rest, steps[done:], strict=True))
    assert not torch.equal(take(loader(Numbers(count=300)), 1)[0], steps[0])


def test_a_step_does_not_depend_on_the_micro_batch():
    sizes = [len(b) for b in next(loader(Numbers()).micro_batches(Position(), 4))]
    assert sizes == [4, 2]
    for a, b in zip(take(loader(Numbers()), 5, micro=1), take(loader(Numbers()), 5, micro=100), strict=True):
        assert torch.equal(a, b)


def test_worker_count_changes_nothing_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    bad = (5,)
    alone, shared = (loader(Numbers(count=300, bad=bad), workers=n) for n in (0, 2))
    shared.workers = 2
    results = [take(pipeline, 60, Position(1, 2), micro=4) for pipeline in (alone, shared)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert alone.report == shared.report and alone.report.unreadable == {"number 5": "is odd"}
    assert torch.equal(state, torch.get_rng_state())


def test_bad_samples_are_replaced_the_same_way_every_time():
    good = take(loader(Numbers(count=200)), 33)
    runs = [take(loader(Numbers(count=200, bad=(7, 8))), 33) for _ in range(2)]
    changed = 0
    for a, b, c in zip(*runs, good, strict=True):
        assert torch.equal(a, b) and len(a) == 6
        changed += int((a != c).sum())
    assert changed == 2


@pytest.mark.parametrize(
    "count, share, allowed", [(100, 0.0, 0), (2000, 0.01, 20), (100, 0.01, 10), (100, 0.2, 20), (12, 0.01, 6)]
)
def test_too_many_unreadable_samples_stop_with_the_list(count: int, share: float, allowed: int) -> None:
    take(loader(Numbers(count=count, bad=tuple(range(allowed))), max_unreadable=share), count // 3)
    pipeline = loader(Numbers(count=count, bad=tuple(range(allowed + 1))), max_unreadable=share)
    with pytest.raises(
        DataError, match=rf"{allowed + 1} of {count:,} samples unreadable, more than {allowed} "
    ) as error:
        take(pipeline, count // 3)
    assert "is odd" in str(error.value) and str(error.value).count("\n") == 1, "a line for a kind"


def test_nothing_readable():
    with pytest.raises(DataError, match="1 of 20 samples unreadable"):
        take(loader(Numbers(bad=tuple(range(20)))), 1)
    pipeline = loader(Numbers(bad=tuple(range(20))))
    pipeline.report = Report("numbers", 10**9)
    with pytest.raises(DataError, match="no readable sample among 100 tried"):
        take(pipeline, 1)


def test_less_than_a_batch_names_the_setting():
    with pytest.raises(DataError, match=r"5 samples are less than one batch; data.batch is 6"):
        take(loader(Numbers(count=5)), 1)


@pytest.mark.parametrize("start", [Position(-1, 0), Position(0, -1)])
def test_negative_position(start):
    with pytest.raises(ValueError, match="position must not be negative"):
        take(loader(Numbers()), 1, start)


def test_in_order_reads_everything_once_without_augmentation_and_leaves_bad_ones_out():
    pipeline = loader(Numbers(count=201, bad=(3,)))
    names, values = [], []
    for some, batch in pipeline.in_order(50):
        names += some
        values += batch.source.tolist()
    assert values == [i for i in range(201) if i != 3]
    assert names[3] == "number 4"
    assert pipeline.report.unreadable == {"number 3": "is odd"}


def test_generator_streams_are_independent_and_repeatable():
    draws = {
        generator(*key).integers(2**60).item()
        for key in [(1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 0, 0, 0), (2, 0, 0)]
    }
    assert len(draws) == 5
    assert generator(1, 2, 3).integers(2**60) == generator(1, 2, 3).integers(2**60)


SCRIPT = """
import sys
import d2v
from tests.d2v.tiny_runs import tiny
cfg = tiny("image", data={"workers": 1})
try:
    d2v.run(cfg, "x.npz", sys.argv[1])
except d2v.data.types.DataError as error:
    print(error)
"""


def test_a_script_that_workers_import_is_told_of_the_guard(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 24, 24), np.uint8))
    found = {"PYTHONPATH": str(Path(d2v.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "train.py", "run"], cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, **found}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "holds a run already" not in done.stdout + done.stderr, done.stderr
    assert 'must do so under `if __name__ == "__main__":`' in done.stdout.splitlines()[-1]
    assert not (tmp_path / "run").exists()
