"""With one worker and a fixed number of threads, a run's model is the same, byte for byte, however it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from masklake.jobs import train
from masklake.jobs.training import worker as train_worker
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training import epoch, loop
from masklake.pipeline.training.loader import Loader
from masklake.pipeline.training.run_folder import read_latest
from masklake.pipeline.training.stream import epoch_order
from tests.jobs.fake_trainer import FakeTrainer, Killed, counting_run, draw_data

EPOCHS = 2  # of one step
IMAGES = 3  # of `draw_data`


class LearningTrainer(FakeTrainer):
    """Learns, in steps of one image. at: the number of steps, of all starts, with which the next start ends."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        run_epoch, step = loop.run_epoch, epoch.step
        super().__init__(patch)
        self.at, self.steps = -1, 0

        def counted_step(*arguments: Any) -> Any:
            if self.steps == self.at:
                raise Killed(f"step {self.at}")
            self.steps += 1
            return step(*arguments)

        patch.setattr(loop, "run_epoch", run_epoch)
        patch.setattr(epoch, "step", counted_step)
        patch.setattr(train_worker, "_batches", self._batches)

    def _fit(self, plan: Any, storage: Storage, say: Any) -> None:
        self.loader = Loader(plan.rows, plan.spec, storage)
        self.seed = plan.options.seed
        super()._fit(plan, storage, say)

    def _batches(self, run: Any) -> Iterator[Any]:
        latest = read_latest(run.storage, run.uri)
        for number in range(latest["epoch"] if latest else 0, run.epochs):
            for row in epoch_order(IMAGES, run.steps_per_epoch, self.seed, number):
                yield self.loader.load([int(row)], [number])


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., bytes]]:
    """Bytes of the model of a run that ends with each of these numbers of steps (of all its starts), and is started again."""
    data, trainer = draw_data(tmp_path / "data"), LearningTrainer(monkeypatch)
    threads = torch.get_num_threads()

    def run(name: str, *ends: int, **changes: Any) -> bytes:
        small = {"min_sizes": (64,)}
        options = counting_run(data, tmp_path / name, EPOCHS, threads=2, val=None, evaluate_every=0, model=small, **changes)
        trainer.steps = 0
        for trainer.at in ends:
            with pytest.raises(Killed):
                train.run(options, say=lambda _: None)
        trainer.at = -1
        return Path(train.run(options, say=lambda _: None).checkpoint).read_bytes()

    yield run
    torch.set_num_threads(threads)


def test_a_run_that_was_killed_ends_with_the_model_of_one_that_was_not(trained: Callable[..., bytes]) -> None:
    model = trained("undisturbed")
    assert trained("in-its-first-epoch", 0) == model
    assert trained("in-its-last-epoch", 1) == model
    assert trained("twice", 0, 1) == model
    assert trained("another-seed", seed=1) != model
