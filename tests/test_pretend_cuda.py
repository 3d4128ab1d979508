"""The pretended GPU refuses what CUDA refuses, and counts what makes the host wait; what it lets through is computed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from masklake.model.torchvision_ops import nms
from tests.pretend_cuda import Log, pretend_cuda

Use = Callable[[Tensor, Tensor], object]

REFUSED: dict[str, tuple[type[Exception], str, Use]] = {
    "arithmetic": (RuntimeError, "same device", lambda there, here: there + here),
    "arithmetic in place": (RuntimeError, "same device", lambda there, here: here.add_(there)),
    "a 0-dim tensor of the device": (RuntimeError, "same device", lambda there, here: here * there[0]),
    "out=": (RuntimeError, "same device", lambda there, here: torch.add(there, there, out=here)),
    "cat": (RuntimeError, "same device", lambda there, here: torch.cat([there, here])),
    "stack of numbers": (RuntimeError, "same device", lambda there, here: torch.stack([there[0], here[0]])),
    "a layer": (RuntimeError, "same device", lambda there, here: nn.Linear(3, 3)(there)),
    "a convolution": (RuntimeError, "same device", lambda there, here: nn.Conv1d(1, 1, 1)(there[None, None])),
    "gather": (RuntimeError, "same device", lambda there, here: there.gather(0, here.long())),
    "index_select": (RuntimeError, "same device", lambda there, here: there.index_select(0, here.long())),
    "scatter": (RuntimeError, "same device", lambda there, here: there.scatter_add_(0, there.long(), here)),
    "masked_fill": (RuntimeError, "same device", lambda there, here: there.masked_fill(here > 0, 0.0)),
    "where": (RuntimeError, "same device", lambda there, here: torch.where(here > 0, there, there)),
    "searchsorted": (RuntimeError, "same device", lambda there, here: torch.searchsorted(there, here)),
    "NMS": (RuntimeError, "same device", lambda there, here: nms(there.repeat(4, 1).T, here, 0.5)),
    "indices of the device on the host": (RuntimeError, "indices", lambda there, here: here[there.long()]),
    "a mask of the device on the host": (RuntimeError, "indices", lambda there, here: here[there > 0]),
    "assigning host values by index": (RuntimeError, "values", lambda there, here: there.index_put_((there.long(),), here)),
    "assigning host values": (RuntimeError, "values", lambda there, here: there.__setitem__(there.long(), here)),
    "assigning device values": (RuntimeError, "values", lambda there, here: here.__setitem__(here.long(), there)),
    "numpy": (TypeError, "can't convert cuda:0", lambda there, here: there.numpy()),
    "numpy's conversion": (TypeError, "can't convert cuda:0", lambda there, here: np.asarray(there)),
    "pinning": (RuntimeError, r"cannot pin 'torch\.cuda\.FloatTensor'", lambda there, here: there.pin_memory()),
    "a host generator": (
        RuntimeError,
        "'cuda' device type for generator",
        lambda there, here: torch.rand(3, device="cuda", generator=torch.Generator()),
    ),
    "a host generator in place": (
        RuntimeError,
        "'cuda' device type for generator",
        lambda there, here: there.uniform_(generator=torch.Generator()),
    ),
    "a device generator": (
        RuntimeError,
        "'cpu' device type for generator",
        lambda there, here: torch.rand(3, generator=torch.Generator("cuda")),
    ),
    "values that are not there yet": (
        NotImplementedError,
        "nobody waits",
        lambda there, here: there.to("cpu", non_blocking=True),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_refuses_is_refused(what: str) -> None:
    error, message, use = REFUSED[what]
    with pretend_cuda(), pytest.raises(error, match=message):
        use(torch.ones(3, device="cuda"), torch.ones(3))


ALLOWED: dict[str, Use] = {
    "numbers": lambda there, here: there * 2 + 1,
    "a 0-dim host tensor": lambda there, here: there * here[0],
    "host indices": lambda there, here: there[here.long()],
    "a list as indices": lambda there, here: there[[0, 1]],
    "assigning a number": lambda there, here: there.masked_fill_(there > 0, 2),
    "copying into a part": lambda there, here: there[:2].copy_(here[:2]),
    "a layer of the device": lambda there, here: nn.Linear(3, 3).to("cuda")(there),
    "new tensors beside": lambda there, here: (
        there + there.new_zeros(3) + torch.zeros_like(there) + there.new_tensor([1, 2, 3])
    ),
    "from the host": lambda there, here: there + here.to(there.device) + here.cuda() + here.to(there) + here.to(0),
    "an operator in inference mode": lambda there, here: torch.inference_mode()(torch.matmul)(there, there),
    "a generator of the device": lambda there, here: torch.rand(3, device="cuda", generator=torch.Generator("cuda")),
    "a deep copy": lambda there, here: copy.deepcopy(nn.BatchNorm1d(3).to("cuda")).running_mean,
    "a loaded file": lambda there, here: torch.load(_saved(here), map_location=there.device, weights_only=True)["x"],
}


def _saved(x: Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("what", ALLOWED)
def test_what_cuda_allows_stays_on_the_device(what: str) -> None:
    with pretend_cuda():
        out = ALLOWED[what](torch.ones(3, device="cuda"), torch.ones(3))
        assert isinstance(out, Tensor)
        assert (out.device, out.is_cuda, out.is_cpu, out.get_device()) == (torch.device("cuda:0"), True, False, 0)
        assert out.cpu().device.type == "cpu"


WAITS: dict[str, tuple[str | None, Use]] = {
    "item": ("_local_scalar_dense", lambda there, here: float(there[0])),
    "a condition": ("_local_scalar_dense", lambda there, here: bool((there > 0).all())),
    "nonzero": ("nonzero", lambda there, here: torch.where(there > 0)),
    "tolist": ("tolist", lambda there, here: there.tolist()),
    "reading by a mask": ("boolean index", lambda there, here: there[there > 0]),
    "repeating a number of times that is known there": (
        "repeat_interleave",
        lambda there, here: there.repeat_interleave(there.long()),
    ),
    "constants": ("values to the device", lambda there, here: torch.tensor([1.0, 2.0], device="cuda")),
    "constants of its kind": ("values to the device", lambda there, here: there.new_tensor([1.0, 2.0])),
    "to the device": ("to the device", lambda there, here: here.to("cuda")),
    "to the device, not pinned": ("to the device", lambda there, here: here.to("cuda", non_blocking=True)),
    "to the host": ("to the host", lambda there, here: there.cpu()),
    "host indices": ("index from the host", lambda there, here: there[here.long()]),
    "waiting": ("synchronize", lambda there, here: torch.cuda.synchronize()),
    "to the device, pinned": (None, lambda there, here: here.pin_memory().to("cuda", non_blocking=True)),
    "filling where a mask says so": (None, lambda there, here: there.__setitem__(there > 0, 5)),
    "arithmetic alone": (None, lambda there, here: torch.where(there > 0, there, there.new_zeros(3)).sum()),
    "repeating a known number of times": (
        None,
        lambda there, here: there.repeat_interleave(there.long(), output_size=3),
    ),
    "what stays on the host": (None, lambda there, here: float(here[here > 0].sum())),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_the_host_waits_for_is_counted(what: str) -> None:
    expected, use = WAITS[what]
    with pretend_cuda() as log:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        log.clear()
        use(there, here)
        assert [name for name, _ in log.syncs.elements()] == ([expected] if expected else [])


def test_waiting_is_said_or_refused_as_asked() -> None:
    with pretend_cuda():
        there = torch.ones(3, device="cuda")
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchronizing CUDA operation"):
            there.tolist()
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            there.tolist()


def test_a_step_of_training_gives_the_hosts_numbers() -> None:
    def step(device: str) -> tuple[list[Tensor], str]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        loss = model(torch.arange(6.0).view(2, 3).to(device)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return [weight.detach().cpu() for weight in model.parameters()], next(model.parameters()).grad.device.type

    with pretend_cuda() as log:
        there, device = step("cuda")
    here, _ = step("cpu")
    assert device == "cuda"
    assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))
    assert sum(log.launches.values()) > 10


def test_pinned_memory_is_told_from_other() -> None:
    with pretend_cuda():
        plain, pinned = torch.ones(3), torch.ones(3).pin_memory()
        assert (plain.is_pinned(), pinned.is_pinned(), torch.empty(3, pin_memory=True).is_pinned()) == (False, True, True)
        assert pinned.to("cuda").is_pinned() is False


def test_nothing_of_it_stays() -> None:
    before = torch.cuda.is_available(), torch.Generator, torch.load, torch.cuda.Event
    with pretend_cuda() as log:
        there = torch.ones(3, device="cuda")
        assert torch.cuda.is_available()
    assert (torch.cuda.is_available(), torch.Generator, torch.load, torch.cuda.Event) == before
    assert isinstance(log, Log)
    assert (there.device.type, there.numpy().tolist()) == ("cpu", [1, 1, 1])
