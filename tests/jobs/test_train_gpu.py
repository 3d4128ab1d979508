"""The training worker on a pretended GPU, without Ray: its steps, its replica among several, its checkpoints."""

from __future__ import annotations

import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor

from masklake.jobs.training.worker import replica_of
from masklake.model import Category, Target, create_model
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.presets import PRESETS
from masklake.model.weights.checkpoint import dumps, load_checkpoint
from masklake.pipeline.training import epoch as epoch_module
from masklake.pipeline.training.epoch import run_epoch, step
from masklake.pipeline.training.recipe import TINY, build_optimizer
from masklake.pipeline.training.run import State, Worker
from tests.pretend_cuda import pretend_cuda


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Ray's view of this process: a worker with a GPU."""
    context = SimpleNamespace(
        world=1, get_world_size=lambda: context.world, get_world_rank=lambda: 0, get_local_rank=lambda: 0
    )  # fmt: skip
    device = torch.device("cuda:0")
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: device if torch.cuda.is_available() else torch.device("cpu"))
    return context


@pytest.fixture
def two_workers(worker: SimpleNamespace) -> Iterator[None]:
    """As if there were two workers: gradients are averaged by gloo, though over this process alone."""
    worker.world = 2
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def new_model() -> MaskRCNN:
    torch.manual_seed(0)
    disk = (Category(id=3, name="disk"),)
    narrow = {"fpn_channels": 16, "box_hidden": 16, "mask_channels": (16,), "rpn_post_nms_train": 50, "roi_samples": 16}
    return create_model(PRESETS["tiny"].model_copy(update={"keypoint": False, "categories": disk} | narrow)).train()


def samples() -> tuple[list[Tensor], list[Target]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, 60, side), dtype=torch.uint8, generator=generator) for side in (90, 80)]
    masks = torch.zeros(1, 60, 90, dtype=torch.uint8)
    masks[0, 5:40, 5:40] = 1
    labelled = Target(torch.tensor([[5.0, 5, 40, 40]]), torch.tensor([3]), masks)
    return images, [labelled, Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 60, 80).byte())]


def epoch(device: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[Tensor]]:
    """Two steps by the worker's own loop; its row of history, and the weights on the host."""
    monkeypatch.setattr(epoch_module, "to_training", lambda batch, spec: samples())
    monkeypatch.setattr(epoch_module, "replaced_in", lambda batch: set())
    recipe = TINY.model_copy(update={"epochs": 1})
    images = SimpleNamespace(check=lambda unusable: None)
    run: Any = SimpleNamespace(recipe=recipe, steps_per_epoch=2, spec=None, epochs=1, phases=(None,), images=images)
    here = ray.train.torch.get_device()
    worker = Worker(0, ray.train.get_context().get_world_size(), here, replica_of, lambda *_: None, lambda line: None)
    model = new_model().to(device)
    state = State(0, model, build_optimizer(model, recipe, 0.0))
    torch.manual_seed(5)
    row = run_epoch(run, worker, state, worker.replica(model), iter([object()] * 2))
    return row, [weight.detach().cpu() for weight in model.parameters()]


def test_an_epoch_gives_the_cpus_weights(worker: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, weights = epoch("cpu", monkeypatch)
    with pretend_cuda() as log:
        row, there = epoch("cuda", monkeypatch)
    assert row["losses"] == expected["losses"]
    assert all(torch.equal(a, b) for a, b in zip(there, weights, strict=True))
    assert sum(log.launches.values()) > 1000


@pytest.mark.usefixtures("two_workers")
def test_workers_with_a_gpu_each_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, weights = epoch("cpu", monkeypatch)
    with pretend_cuda() as log:
        log.adopts_outputs = True
        row, there = epoch("cuda", monkeypatch)
    assert row["losses"] == expected["losses"]
    assert all(torch.equal(a, b) for a, b in zip(there, weights, strict=True))


@pytest.mark.usefixtures("two_workers")
def test_a_replica_gets_its_images_on_the_host_and_checkpoints_do_not_see_it() -> None:
    model = new_model()
    with pretend_cuda() as log:
        log.adopts_outputs = True
        replica: Any = replica_of(model)
        seen: list[tuple[Tensor, Target]] = []
        model.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0][0], inputs[1][0])))
        images, targets = samples()
        losses = replica(images, targets)
        assert isinstance(replica, torch.nn.parallel.DistributedDataParallel)
        assert (replica.device_ids, replica.broadcast_buffers) == (None, False)
        assert (seen[0][0].device.type, seen[0][1].boxes.device.type) == ("cpu", "cpu")
        assert {loss.device.type for loss in losses.values()} == {"cuda"}
        torch.stack(list(losses.values())).sum().backward()
        assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
        assert load_checkpoint(dumps(replica.module), "cuda").model_id == model.model_id


def test_images_that_somebody_sent_already_are_taken_as_they_are() -> None:
    model, (images, targets) = new_model(), samples()
    with pretend_cuda():
        model.to("cuda")
        torch.manual_seed(0)
        expected = model(images, targets)
        torch.manual_seed(0)
        moved = [
            Target(target.boxes.cuda(), target.labels.cuda(), target.masks.cuda())  # type: ignore[union-attr]
            for target in targets
        ]
        found = model([image.cuda() for image in images], moved)
        assert {name: float(loss) for name, loss in found.items()} == {name: float(loss) for name, loss in expected.items()}


def test_a_checkpoint_goes_on_there() -> None:
    model, (images, targets) = new_model(), samples()
    with pretend_cuda():
        model.to("cuda")
        optimizer = build_optimizer(model, TINY, 1e-3)
        step(model, images, targets, optimizer, TINY)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again = load_checkpoint(dumps(model), torch.device("cuda:0")).train()
        resumed = build_optimizer(again, TINY, 1e-3)
        resumed.load_state_dict(torch.load(file, map_location=torch.device("cuda:0"), weights_only=True))
        for one, other in ((model, optimizer), (again, resumed)):
            torch.manual_seed(3)
            step(one, images, targets, other, TINY)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        assert {weight.device.type for weight in again.parameters()} == {"cuda"}
