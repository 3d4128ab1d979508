"""The sections of `benchmarks.gpu`: each a function that yields rows of plain values, in the order in which they run.

Shape letters: B images, N detections, R RoIs.
"""

from __future__ import annotations

import collections
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms

from benchmarks import kernels
from benchmarks.record import Timing, side_by_side
from benchmarks.rle import detections
from benchmarks.seeded import seeded_state_dict
from masklake.model import PRESETS, MaskRCNN, PredictOptions, create_model, load_checkpoint, save_checkpoint
from masklake.model.boxes import suppress
from masklake.model.coco_categories import PERSON
from masklake.model.devices import arithmetic
from masklake.model.fields import Precision
from masklake.model.inference import Detections as Found
from masklake.model.inference import Settings, propose, resolve, select, to_instances
from masklake.model.inference_network import DTYPES
from masklake.model.instances import Instances, Target
from masklake.model.kernels.mask_rle import mask_edges
from masklake.model.masks.rle import encode_on_device, pack_edges
from masklake.model.proposals.rpn import Regions
from masklake.pipeline.training.recipe import Recipe, build_optimizer, clip, recipe_of

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
Size = tuple[int, int]
DEVICE = "cuda"


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    name: str
    models: Mapping[str, str]  # what it is measured for -> preset
    changes: Mapping[str, Mapping[str, Any]]  # of these presets' configurations
    seeded: bool  # weights tuned to a number of detections, as a trained model's; else random
    detections: int  # of an image, where the weights are seeded
    equal: Size  # (H, W) of the pictures of equal canvas
    mixed: tuple[Size, ...]
    batches: tuple[int, ...]
    images: int  # of one timed call
    steps: tuple[int, ...]  # images of a training step
    instances: int  # of a training image
    nms_boxes: int  # of an image
    nms_batches: tuple[int, ...]
    rois: tuple[int, int]  # images, RoIs of each
    canvas: Size
    channels: int
    masks: int
    masks_in: Size
    copied: int  # float32 elements
    product: int  # side of the square matrices
    repeats: int
    tests: tuple[str, ...]  # pytest's arguments
    tests_s: float


FULL = Scale(
    name="full",
    models={"mask": "maskrcnn_resnet50_fpn", "keypoint": "keypointrcnn_resnet50_fpn", "tiny": "tiny"},
    changes={},
    seeded=True,
    detections=20,
    equal=(720, 1200),  # 800 x 1333 on its canvas
    mixed=((480, 640), (640, 480), (427, 640), (640, 427), (375, 500), (500, 375), (512, 640), (720, 1200)),
    batches=(1, 4, 8),
    images=8,
    steps=(2, 8),
    instances=8,
    nms_boxes=4819,
    nms_batches=(1, 2, 4, 8),
    rois=(8, 1000),
    canvas=kernels.CANVAS,
    channels=kernels.CHANNELS,
    masks=100,
    masks_in=(800, 1333),
    copied=1 << 28,
    product=8192,
    repeats=7,
    tests=("tests/model/kernels", "tests/model/test_mask_rcnn.py"),
    tests_s=100.0,
)

NARROW = {"min_sizes": (64,), "max_size": 96, "rpn_post_nms_test": 50}

SMALL = Scale(
    name="small",
    models={"mask": "tiny", "keypoint": "tiny"},
    changes={"mask": NARROW, "keypoint": {**NARROW, "categories": (PERSON,), "mask": False, "keypoint": True}},
    seeded=False,
    detections=20,
    equal=(48, 64),
    mixed=((48, 64), (64, 48), (40, 64)),
    batches=(1, 2),
    images=1,
    steps=(2,),
    instances=2,
    nms_boxes=50,
    nms_batches=(1, 2),
    rois=(2, 20),
    canvas=(96, 128),
    channels=4,
    masks=5,
    masks_in=(40, 60),
    copied=1 << 12,
    product=16,
    repeats=1,
    tests=("tests/model/proposals/test_anchors.py",),
    tests_s=60.0,
)


@dataclass
class Bench:
    """What all sections share: sizes, a folder for what is made once, and where real photographs are, if anywhere."""

    scale: Scale
    scratch: Path
    photographs: Path | None = None

    def model(self, use: str, device: str = DEVICE) -> MaskRCNN:
        """A fresh copy of the model of this use on ``device``; its weights are made once, by whichever section asks first."""
        path = self.scratch / f"{use}.safetensors"
        if not path.exists():
            unfinished = path.with_suffix(".partial")
            save_checkpoint(make_model(self, use), unfinished)
            unfinished.replace(path)
        return load_checkpoint(path).to(device)

    def state(self, use: str) -> dict[str, Tensor]:
        """torchvision's state dict of the same weights; FileNotFoundError where they are random, or not made yet."""
        state: dict[str, Tensor] = torch.load(self.scratch / f"{use}.pth", weights_only=True)
        return state

    def pictures(self, sizes: Sequence[Size]) -> list[Tensor]:
        """uint8 RGB (3, H, W) of these sizes: cut from photographs where there are, else drawn."""
        photographs: Iterator[Path] = iter(())
        if self.photographs is not None:
            files = sorted(path for path in self.photographs.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
            photographs = iter(files)
        return [photograph_or_drawing(next(photographs, None), size, seed) for seed, size in enumerate(sizes)]


def photograph_or_drawing(file: Path | None, size: Size, seed: int) -> Tensor:
    """A picture of exactly ``size``: the photograph resized, or soft blobs of colour with sharp rectangles on them."""
    if file is not None:
        photograph = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
        resized = torch.nn.functional.interpolate(photograph[None].float(), size=size, mode="bilinear", antialias=True)
        return resized[0].round().clamp(0, 255).byte()
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 9, 15, generator=generator) * 255
    picture = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")[0]
    picture += torch.randn(3, *size, generator=generator) * 6
    for _ in range(12):
        top, left, h, w = (torch.rand(4, generator=generator) * torch.tensor([*size, size[0] / 3, size[1] / 3])).int().tolist()
        picture[:, top : top + h + 2, left : left + w + 2] = torch.rand(3, 1, 1, generator=generator) * 255
    return picture.round().clamp(0, 255).byte()


def make_model(bench: Bench, use: str) -> MaskRCNN:
    """The model of a use, on the host: seeded weights that find a number of things, or random ones."""
    name = bench.scale.models[use]
    builder = peer_of(bench.scale, use)
    if not bench.scale.seeded or builder is None:
        torch.manual_seed(0)
        return create_model(PRESETS[name].changed(**bench.scale.changes.get(use, {})))
    pictures = [picture / 255 for picture in bench.pictures([bench.scale.equal] * 2)]
    state = seeded_state_dict(builder, pictures, bench.scale.detections)
    torch.save(state, bench.scratch / f"{use}.pth")
    held = io.BytesIO()
    torch.save(state, held)
    return create_model(name, weights=held.getvalue())


def loose(scale: Scale, precision: Precision, batch_size: int = 4, use: str = "mask") -> PredictOptions:
    """Options under which random weights find something, too."""
    own = {} if scale.seeded and peer_of(scale, use) else {"score_threshold": 0.0, "max_detections": 10}
    return PredictOptions(precision=precision, batch_size=batch_size, **own)


def peer_of(scale: Scale, use: str) -> Callable[..., torch.nn.Module] | None:
    """torchvision's builder of the same model, if it has one."""
    builder: Callable[..., torch.nn.Module] | None = getattr(torchvision.models.detection, scale.models[use], None)
    return builder


# -- the machine -------------------------------------------------------------------------------------------------------


def machine(bench: Bench) -> Iterator[Row]:
    """Card, driver and versions."""
    facts = torch.cuda.get_device_properties(0)
    yield {
        "card": facts.name,
        "memory_GiB": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
        "capability": f"{facts.major}.{facts.minor}",
        "bf16": torch.cuda.is_bf16_supported(),
        "driver": driver_version(),
    }
    versions = {name: version_of(name) for name in ("torch", "torchvision", "triton", "numpy", "pycocotools")}
    cudnn = torch.backends.cudnn.version()
    yield {**versions, "cuda": torch.version.cuda or "none", "cudnn": cudnn or "none", "python": platform.python_version()}


def driver_version() -> str:
    """As nvidia-smi tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip() or "unknown"


def version_of(package: str) -> str:
    """Its version, or none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def ceilings(bench: Bench) -> Iterator[Row]:
    """What this card can do at best: copies on it and to the host, and matrix products of random numbers."""
    scale = bench.scale
    source = torch.randn(scale.copied, device=DEVICE)
    target, host = torch.empty_like(source), torch.empty(scale.copied, pin_memory=True)
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "copy on the device (read + written)": (lambda: target.copy_(source), 2 * source.nbytes),
        "copy to the host (pinned)": (lambda: host.copy_(source, non_blocking=True), source.nbytes),
        "copy from the host (pinned)": (lambda: target.copy_(host, non_blocking=True), source.nbytes),
    }
    for name, (run, moved) in runs.items():
        took = kernels.in_bursts({"run": run}, scale.repeats)["run"]
        yield {"what": name, "ms": ms(took), "rate": f"{moved / took.median / 1e9:.0f} GB/s", "spread": f"{took.spread:.0%}"}
    precisions: tuple[Precision, ...] = ("bf16", "fp32", "tf32")
    for precision in precisions:
        with arithmetic(precision, torch.device(DEVICE)):
            yield matrix_product(precision, DTYPES[precision], scale)


def matrix_product(name: str, dtype: torch.dtype, scale: Scale) -> Row:
    """A square one; random numbers, for zeros run faster."""
    left, right = (torch.randn(scale.product, scale.product, device=DEVICE).to(dtype) for _ in range(2))
    took = kernels.in_bursts({"run": lambda: left @ right}, scale.repeats)["run"]
    rate = 2 * scale.product**3 / took.median / 1e12
    what = f"{name} matrix product, {scale.product} a side"
    return {"what": what, "ms": ms(took), "rate": f"{rate:.1f} TFLOP/s", "spread": f"{took.spread:.0%}"}


def ms(timing: Timing, per: int = 1) -> float:
    """The median in milliseconds."""
    return round(timing.median / per * 1e3, 3)


# -- is it right? ------------------------------------------------------------------------------------------------------


FLOORS = {"fp32": (0.95, 0.99), "bf16": (0.7, 0.9)}
"""Minimum share of matched detections, and minimum mean mask IoU, of a GPU that works."""

SLACK = 0.1
"""By how much bf16 may be further from fp32 than torchvision's autocast is, on the same random weights, whose scores and masks
are nearly all close calls."""


def correctness(bench: Bench) -> Iterator[Row]:
    """The GPU's detections against the CPU's, and between precisions, batch sizes and full and partial batches.

    Raises AssertionError after the last row when detections are worse than `FLOORS`, or a short batch's are others.
    """
    faults: list[str] = []
    peers: dict[str, Row] = {}
    for row in _comparisons(bench):
        yield row
        use = row["comparison"].split(":")[0]
        if "torchvision" in row["comparison"]:
            peers[use] = row
        else:
            faults += fault(row, peers.get(use))
    if faults:
        raise AssertionError("; ".join(faults))


def fault(row: Row, peer: Row | None = None) -> list[str]:
    """What is wrong with a comparison, in one phrase, or nothing. peer: torchvision's bf16 against its fp32."""
    precision = "bf16" if "bf16" in row["comparison"] else "fp32"
    share, overlap = FLOORS[precision]
    if precision == "bf16" and peer is not None:
        share = min(share, peer["matched"] / detections_of(peer) - SLACK)
        overlap = min(overlap, (peer["mask_iou_mean"] or 1.0) - SLACK)
    if row["comparison"].endswith("short"):
        same, images = row["images_equal_bit_by_bit"].split(" of ")
        return [] if same == images else [f"{row['comparison']}: {same} of {images} images are equal"]
    if not detections_of(row):
        return [f"{row['comparison']}: nothing was found"]
    if row["matched"] < share * detections_of(row):
        return [f"{row['comparison']}: {row['matched']} of {detections_of(row)} detections match"]
    if (iou := row["mask_iou_mean"]) is not None and iou < overlap:
        return [f"{row['comparison']}: the masks' mean IoU is {iou}"]
    return []


def detections_of(row: Row) -> int:
    """The larger of a comparison's two numbers of detections."""
    return max(map(int, row["detections"].split(" and ")))


def _comparisons(bench: Bench) -> Iterator[Row]:
    scale = bench.scale
    pictures = bench.pictures([scale.equal, scale.equal, *scale.mixed[:2]])
    for use in scale.models:
        expected = bench.model(use, "cpu").predict(pictures, loose(scale, "fp32", use=use))
        model = bench.model(use)
        if scale.seeded and peer_of(scale, use):
            exact, rounded = (peer_finds(bench, use, pictures, autocast) for autocast in (False, True))
            yield {"comparison": f"{use}: torchvision autocast to bf16 against its fp32", **agreement(exact, rounded)}
        for precision in ("fp32", "bf16"):
            found = model.predict(pictures, loose(scale, precision, use=use))
            yield {"comparison": f"{use}: {precision} on the GPU against fp32 on the CPU", **agreement(expected, found)}
    pictures = bench.pictures([scale.equal] * max(scale.batches))
    for use in scale.models:
        model = bench.model(use)
        for precision in ("fp32", "bf16"):
            alone = model.predict(pictures, loose(scale, precision, scale.batches[0], use))
            for size in scale.batches[1:]:
                together = model.predict(pictures, loose(scale, precision, size, use))
                what = f"{use}: {precision}, batches of {size} against {scale.batches[0]}"
                yield {"comparison": what, **agreement(alone, together)}
            size = scale.batches[-1]
            whole = model.predict(pictures, loose(scale, precision, size, use))
            part = model.predict(pictures[:-1], loose(scale, precision, size, use))
            yield {"comparison": f"{use}: {precision}, batches of {size}, the last one short", **agreement(whole[:-1], part)}


def peer_finds(bench: Bench, use: str, pictures: Sequence[Tensor], autocast: bool) -> list[Instances]:
    """torchvision's detections with the same weights, on the device."""
    peer = peer_model(bench, use)
    found = []
    with (
        torch.inference_mode(),
        torch.autocast(DEVICE, torch.bfloat16, enabled=autocast),
        arithmetic("fp32", torch.device(DEVICE)),
    ):
        for picture in pictures:
            (output,) = peer([picture.to(DEVICE) / 255])
            values = {name: value.float().cpu().numpy() for name, value in output.items()}
            found.append(
                Instances(
                    size=(picture.shape[1], picture.shape[2]),
                    boxes=values["boxes"],
                    scores=values["scores"],
                    labels=values["labels"].astype(np.int64),
                    rles=encoded(values["masks"][:, 0]) if "masks" in values else None,
                    areas=None,
                    keypoints=values.get("keypoints"),
                )
            )
    return found


def peer_model(bench: Bench, use: str) -> torch.nn.Module:
    """torchvision's model with the same weights, on the device."""
    builder = peer_of(bench.scale, use)
    assert builder is not None
    peer = builder(weights=None, weights_backbone=None)
    peer.load_state_dict(bench.state(use), strict=False)
    return peer.eval().to(DEVICE)


def encoded(pasted: np.ndarray) -> list[bytes]:
    """RLE of pasted mask probabilities (N, H, W), by pycocotools."""
    return [coco_mask.encode(np.asfortranarray(mask > 0.5))["counts"] for mask in pasted]


def agreement(expected: Sequence[Instances], found: Sequence[Instances]) -> Row:
    """How far two systems' detections of the same pictures agree: pairs of one class, best box overlap first."""
    pairs = [pair for a, b in zip(expected, found, strict=True) for pair in matched(a, b)]
    boxes = [float(np.abs(a.boxes[i] - b.boxes[j]).max()) for a, b, i, j in pairs]
    scores = [float(abs(a.scores[i] - b.scores[j])) for a, b, i, j in pairs]
    masks = [mask_iou(a, b, i, j) for a, b, i, j in pairs if a.rles is not None and b.rles is not None]
    points = [
        float(np.abs(a.keypoints[i, :, :2] - b.keypoints[j, :, :2]).max())
        for a, b, i, j in pairs
        if a.keypoints is not None and b.keypoints is not None and not np.isnan(a.keypoints[i, 0, 0])
    ]
    return {
        "detections": f"{sum(map(len, expected))} and {sum(map(len, found))}",
        "matched": len(pairs),
        "images_equal_bit_by_bit": f"{sum(map(equal, expected, found))} of {len(expected)}",
        "box_px_median": middle(boxes),
        "box_px_most": most(boxes),
        "score_most": most(scores),
        "mask_iou_mean": round(statistics.fmean(masks), 5) if masks else None,
        "mask_iou_least": round(min(masks), 5) if masks else None,
        "keypoint_px_median": middle(points),
        "keypoint_px_most": most(points),
    }


def middle(values: Sequence[float]) -> float | None:
    """The median, or None of nothing."""
    return float(f"{statistics.median(values):.3g}") if values else None


def most(values: Sequence[float]) -> float | None:
    """The greatest, or None of nothing."""
    return float(f"{max(values):.3g}") if values else None


def equal(one: Instances, other: Instances) -> bool:
    """The same bits in every array and mask."""
    arrays = ((one.boxes, other.boxes), (one.scores, other.scores), (one.labels, other.labels))
    same = all(np.array_equal(a, b) for a, b in arrays) and one.rles == other.rles
    if one.keypoints is None or other.keypoints is None:
        return same and one.keypoints is other.keypoints
    return same and np.array_equal(one.keypoints, other.keypoints, equal_nan=True)


def matched(one: Instances, other: Instances) -> Iterator[tuple[Instances, Instances, int, int]]:
    """Detections of the same class whose boxes overlap by half, each at most once."""
    if not len(one) or not len(other):
        return
    ious = coco_mask.iou(xywh(one.boxes), xywh(other.boxes), [0] * len(other))
    ious = np.where(one.labels[:, None] == other.labels[None, :], ious, 0.0)
    for place in np.argsort(-ious, axis=None):
        row, column = divmod(int(place), len(other))
        if ious[row, column] < 0.5:
            continue
        ious[row, :], ious[:, column] = 0.0, 0.0
        yield one, other, row, column


def xywh(boxes: np.ndarray) -> np.ndarray:
    """COCO's form, float64."""
    wide = boxes.astype(np.float64)
    return np.concatenate((wide[:, :2], wide[:, 2:] - wide[:, :2]), axis=1)


def mask_iou(one: Instances, other: Instances, i: int, j: int) -> float:
    """Of two masks in one image; two empty ones are equal."""
    assert one.rles is not None
    assert other.rles is not None
    if one.rles[i] == other.rles[j]:
        return 1.0
    masks = [{"size": list(held.size), "counts": held.rles[k]} for held, k in ((one, i), (other, j)) if held.rles is not None]
    return float(coco_mask.iou(masks[:1], masks[1:], [0])[0, 0])


def gpu_tests(bench: Bench) -> Iterator[Row]:
    """The kernels' tests, compiled for this card instead of interpreted, and those marked `gpu`."""
    with tempfile.NamedTemporaryFile("w", suffix=".ini") as ini:
        # Not pyproject.toml: its strictness asks for plugins that a borrowed machine may lack.
        ini.write("[pytest]\nmarkers =\n  slow: of the project\n  faults: of the project\n  gpu: of the project\n")
        ini.flush()
        options = ["-q", "-rfE", "-c", ini.name, f"--rootdir={ROOT}", "--import-mode=importlib", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, *in_parallel(), *bench.scale.tests]
        code, output, errors = run_within(command, bench.scale.tests_s)
    lines = output.splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    passed = sum(" PASSED" in line for line in lines)
    yield {"exit_code": code, "passed": passed, "summary": lines[-1] if lines else errors[-300:]}
    for line in failures:
        yield {"failure": line[:300]}
    if code not in (0, 5):
        tail = "\n".join(line for line in lines if " PASSED" not in line)[-20000:]
        raise RuntimeError(f"the tests failed:\n{tail}\n{errors[-1000:]}")


def in_parallel() -> list[str]:
    """pytest's options for several processes, if pytest-xdist is there: most of a test's time is compiling its kernel."""
    return ["-v", "-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else ["-v"]


def run_within(command: Sequence[str], limit_s: float) -> tuple[int | str, str, str]:
    """Exit code, output and errors of a command; what it has printed so far, and "out of time", if it takes longer."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=subprocess_environment(), capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as expired:
        output, errors = ((text or b"").decode() for text in (expired.stdout, expired.stderr))
        return "out of time", output, errors
    return done.returncode, done.stdout, done.stderr


def subprocess_environment() -> dict[str, str]:
    """This process's with the checkout on its path, without the interpreter: on a GPU kernels are compiled."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))}


# -- kernels -----------------------------------------------------------------------------------------------------------


def roi_align(bench: Bench) -> Iterator[Row]:
    """Forward and backward beside torchvision's, with the share of the copy's bandwidth."""
    scale = bench.scale
    bandwidth = kernels.copy_bandwidth(DEVICE, scale.repeats, scale.copied)
    scene = kernels.scene(*scale.rois, DEVICE, canvas=scale.canvas, channels=scale.channels)
    yield from kernels.roi_align_roofline(scene, bandwidth, scale.repeats)


def masks(bench: Bench) -> Iterator[Row]:
    """Masks to RLE on the host, beside pasting and pycocotools, and split into what it consists of."""
    size, repeats = bench.scale.masks_in, bench.scale.repeats
    yield from kernels.masks_to_host(DEVICE, size, repeats, bench.scale.masks)
    on_host = detections(size, count=bench.scale.masks)
    probs, boxes = (tensor.to(DEVICE) for tensor in on_host)
    images = torch.zeros(len(boxes), dtype=torch.int64, device=DEVICE)
    sizes = torch.tensor([size], device=DEVICE).expand(len(boxes), 2).contiguous()
    room = size[1] * len(boxes)

    def on_device() -> tuple[Tensor, Tensor]:
        return mask_edges(probs, boxes, sizes, 0.5, size[1], room)

    counts, edges = on_device()
    host_counts, host_edges = counts.cpu(), edges.cpu()
    used, pixels = int(host_counts.sum()), np.full(len(boxes), size[0] * size[1], np.int64)
    runs: dict[str, Callable[[], object]] = {
        "kernels (find the edges)": on_device,
        "copy of counts and edges to the host": lambda: (counts.cpu(), edges.cpu()),
        "packing on the host": lambda: pack_edges(host_edges[:used].numpy(), host_counts.numpy(), pixels),
        "all together": lambda: encode_on_device(probs, boxes, images, [size], 0.5, boxes),
    }
    for name, took in side_by_side(runs, repeats).items():
        yield {"part": name, "masks": len(boxes), "ms": ms(took), "spread": f"{took.spread:.0%}", "edges": used}


def nms(bench: Bench) -> Iterator[Row]:
    """Suppression alone, of as many boxes as an RPN's levels bring, beside torchvision's image by image."""
    scale = bench.scale
    for batch in scale.nms_batches:
        boxes, scores, levels, images = rpn_like(batch, scale)

        def peer(boxes: Tensor = boxes, scores: Tensor = scores, levels: Tensor = levels, batch: int = batch) -> list[Tensor]:
            parts = zip(boxes.chunk(batch), scores.chunk(batch), levels.chunk(batch), strict=True)
            return [batched_nms(*part, 0.7) for part in parts]

        def ours(boxes: Tensor = boxes, scores: Tensor = scores, levels: Tensor = levels, images: Tensor = images) -> Tensor:
            return suppress(boxes, scores, levels, images, 0.7)

        times = kernels.in_bursts({"ours": ours, "peer": peer}, scale.repeats)
        kept = len(ours()), sum(map(len, peer()))
        extra = {"boxes": scale.nms_boxes, "kept": f"{kept[0]} and {kept[1]}"}
        yield kernels.row(f"suppression, {batch} images", times["ours"], times["peer"], **extra)


def rpn_like(batch: int, scale: Scale) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """boxes (B * n, 4), scores, levels and images (B * n,) of crowded proposals."""
    rois, levels = kernels.proposals(batch, scale.nms_boxes)
    scores = torch.rand(len(rois), generator=torch.Generator().manual_seed(3))
    return rois[:, 1:].to(DEVICE), scores.to(DEVICE), levels.to(DEVICE), rois[:, 0].long().to(DEVICE)


# -- inference ---------------------------------------------------------------------------------------------------------


def predict(bench: Bench) -> Iterator[Row]:
    """Images a second, from pictures on the host to RLE on the host, beside torchvision on equal canvases."""
    scale = bench.scale
    mixed = [scale.mixed[index % len(scale.mixed)] for index in range(scale.images)]
    model = bench.model("mask")
    for canvases, sizes in (("equal", [scale.equal] * scale.images), ("mixed", mixed)):
        pictures = bench.pictures(sizes)
        runs: dict[str, Callable[[], object]] = {
            f"{precision}, batches of {batch}": partial(model.predict, pictures, loose(scale, precision, batch))
            for precision, batches in (("fp32", scale.batches), ("tf32", scale.batches[1:2]), ("bf16", scale.batches))
            for batch in batches
        }
        if canvases == "equal" and scale.seeded:
            runs |= torchvision_runs(bench, pictures)
        found = sum(map(len, model.predict(pictures, loose(scale, "fp32"))))
        for name, took in side_by_side(runs, scale.repeats).items():
            yield {
                "canvases": canvases,
                "run": name,
                "images_per_s": round(len(pictures) / took.median, 1),
                "ms_per_image": ms(took, len(pictures)),
                "spread": f"{took.spread:.0%}",
                "detections_per_image": round(found / len(pictures), 1),
            }


def torchvision_runs(bench: Bench, pictures: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    """The peer with the same weights: pasted masks thresholded and encoded by pycocotools, as its users do."""
    peer = peer_model(bench, "mask")

    def run(autocast: bool, batch: int) -> None:
        with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            for start in range(0, len(pictures), batch):
                for found in peer([picture.to(DEVICE) / 255 for picture in pictures[start : start + batch]]):
                    encoded((found["masks"][:, 0] > 0.5).cpu().numpy())

    return {
        f"torchvision {name}, batches of {batch}": partial(run, autocast, batch)
        for name, autocast in (("fp32", False), ("autocast to bf16", True))
        for batch in bench.scale.batches[:2]
    }


def stages(bench: Bench) -> Iterator[Row]:
    """Where a batch's time goes; each stage is waited for, so the sum is more than `predict` takes."""
    scale = bench.scale
    batch = max(size for size in scale.batches if size <= 4)
    pictures = bench.pictures([scale.equal] * batch)
    model = bench.model("mask")
    for precision in ("fp32", "bf16"):
        options = loose(scale, precision, batch)
        model.predict(pictures, options)  # prepares
        timed: dict[str, list[float]] = collections.defaultdict(list)
        for _ in range(scale.repeats + 1):
            for name, seconds in one_pass(model, pictures, options):
                timed[name].append(seconds)
        total = sum(statistics.median(values[1:]) for values in timed.values())
        for name, values in timed.items():
            took = Timing(tuple(values[1:]))
            share = f"{took.median / total:.0%}"
            yield {"precision": precision, "batch": batch, "stage": name, "ms": ms(took), "share": share}


def one_pass(model: MaskRCNN, pictures: Sequence[Tensor], options: PredictOptions) -> Iterator[tuple[str, float]]:
    """A batch through `model.inference`'s steps, with the seconds of each; the device is waited for after each."""
    network, config = model._network_for(options.precision), model.config
    settings: Settings = resolve(options, config)
    held: dict[str, Any] = {}

    def canvas() -> None:
        made = model._canvas(pictures, config.min_sizes[-1])
        held["canvas"] = replace(made, pixels=made.pixels.to(DTYPES[options.precision]))

    def backbone() -> None:
        held["features"] = network.backbone(held["canvas"].pixels)

    def proposals() -> None:
        held["proposals"] = propose(network, held["canvas"], held["features"])

    def boxes() -> None:
        logits, deltas = network.box_head(network.box_input(held["features"], held["proposals"]))
        coder = network.box_head.coder
        sizes = held["canvas"].sizes
        held["found"] = select(logits, deltas, held["proposals"], sizes, coder, config.box_min_side, settings)

    def mask_branch() -> None:
        found: Found = held["found"]
        regions = Regions(found.boxes, found.images)
        logits = network.mask_head(network.mask_input(held["features"], regions), found.classes)
        held["masks"] = logits.float().sigmoid()

    def host() -> None:
        found: Found = held["found"]
        whole = Found(found.boxes, found.scores, found.classes, found.images, held["masks"], None)
        sizes = [(picture.shape[-2], picture.shape[-1]) for picture in pictures]
        to_instances(whole, held["canvas"], sizes, model._category_ids, config, settings.mask_threshold)

    steps = {
        "canvas (copy, resize, normalise)": canvas,
        "backbone and FPN": backbone,
        "RPN": proposals,
        "box branch and suppression": boxes,
        "mask branch": mask_branch,
        "to the host, RLE": host,
    }
    with torch.inference_mode(), arithmetic(options.precision, model.device):
        for name, step in steps.items():
            yield name, side_by_side({"step": step}, 1, warm=False)["step"].median


def profile(bench: Bench) -> Iterator[Row]:
    """A batch and a training step under the profiler: which kernels take most, how busy the device is, its longest pauses."""
    scale = bench.scale
    batch = max(size for size in scale.batches if size <= 4)
    pictures, model = bench.pictures([scale.equal] * batch), bench.model("mask")
    options = loose(scale, "bf16", batch)
    yield from profiled(f"predict, {batch} images, bf16", lambda: model.predict(pictures, options))
    yield from profiled(f"training step, {scale.steps[0]} images", make_step(bench, scale.steps[0]))


def profiled(name: str, run: Callable[[], object]) -> Iterator[Row]:
    """What the profiler tells of one call, after three that warm up."""
    for _ in range(3):
        run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    events = list(profiler.events() or [])
    device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    where = "device" if device else "host (no device was there)"
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in device or events)
    yield from busiest(spans, f"{name}: {where}")
    yield from pauses(spans)


Span = tuple[float, float, str]


def busiest(spans: Sequence[Span], where: str, count: int = 20) -> Iterator[Row]:
    """How busy, then the ``count`` names that take most; microseconds."""
    whole = max(end for _, end, _ in spans) - spans[0][0]
    yield {"on": where, "span_us": round(whole), "busy": f"{busy_time(spans) / whole:.0%}", "launches": len(spans)}
    totals: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for start, end, name in spans:
        totals[name] += end - start
        calls[name] += 1
    for name, total in totals.most_common(count):
        yield {"kernel": name[:100], "calls": calls[name], "us": round(total, 1), "share": f"{total / whole:.1%}"}


def busy_time(spans: Sequence[Span]) -> float:
    """Length of the union of spans that are sorted by their start."""
    total, reached = 0.0, -float("inf")
    for start, end, _ in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def pauses(spans: Sequence[Span], count: int = 10) -> Iterator[Row]:
    """The longest gaps in which nothing ran, and what came before and after."""
    gaps: list[tuple[float, str, str]] = []
    reached, last = spans[0][1], spans[0][2]
    for start, end, name in spans[1:]:
        if start > reached:
            gaps.append((start - reached, last, name))
        if end > reached:
            reached, last = end, name
    for length, before, after in sorted(gaps, reverse=True)[:count]:
        yield {"pause_us": round(length, 1), "after": before[:80], "before": after[:80]}


# -- training ----------------------------------------------------------------------------------------------------------


def training(bench: Bench) -> Iterator[Row]:
    """A step of the mask model (forward, backward, clipping, optimiser) and its parts, beside torchvision's in fp32."""
    scale = bench.scale
    for batch in scale.steps:
        steps = {precision: make_step(bench, batch, precision) for precision in TRAINED_IN}
        runs: dict[str, Callable[[], object]] = {f"ours, {precision}": step for precision, step in steps.items()}
        if scale.seeded:
            runs["torchvision, fp32"] = make_peer_step(bench, batch)
        for name, took in side_by_side(runs, scale.repeats).items():
            yield {
                "run": name,
                "batch": batch,
                "ms": ms(took),
                "images_per_s": round(batch / took.median, 1),
                "spread": f"{took.spread:.0%}",
            }
        for precision, step in steps.items():
            yield {"parts_of": f"ours, {precision}", "batch": batch, **step.parts()}


TRAINED_IN: tuple[Precision, ...] = ("fp32", "tf32")


@dataclass
class Step:
    """A training step on pictures of equal size; calling it returns the losses before it."""

    model: MaskRCNN
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    pictures: Sequence[Tensor]
    targets: Sequence[Target]
    precision: Precision

    def __call__(self) -> dict[str, float]:
        """Forward, backward, clipping, optimiser."""
        losses: dict[str, Tensor] = {}
        with arithmetic(self.precision, self.model.device):
            for _, part in self._in_turn(losses):
                part()
        return dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))

    def parts(self) -> Row:
        """Milliseconds and peak memory of each part of one step, and the losses."""
        losses: dict[str, Tensor] = {}
        row: Row = {}
        with arithmetic(self.precision, self.model.device):
            for name, part in self._in_turn(losses):
                torch.cuda.reset_peak_memory_stats()
                row[f"{name}_ms"] = ms(side_by_side({"part": part}, 1, warm=False)["part"])
                row[f"{name}_peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return {**row, "losses": ", ".join(f"{name} {float(value):.3f}" for name, value in losses.items())}

    def _in_turn(self, losses: dict[str, Tensor]) -> Iterator[tuple[str, Callable[[], object]]]:
        def backward() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()

        def update() -> None:
            clip(self.model.parameters(), self.recipe)
            self.optimizer.step()

        yield "forward", lambda: losses.update(self.model(self.pictures, self.targets))
        yield "backward", backward
        yield "optimizer", update


def make_step(bench: Bench, batch: int, precision: Precision = "fp32") -> Step:
    """A training step on ``batch`` pictures of equal size."""
    scale = bench.scale
    model = bench.model("mask").train()
    recipe = recipe_of(scale.models["mask"])
    return Step(
        model=model,
        optimizer=build_optimizer(model, recipe, 1e-4),
        recipe=recipe,
        pictures=bench.pictures([scale.equal] * batch),
        targets=[make_target(model, scale, seed) for seed in range(batch)],
        precision=precision,
    )


def make_peer_step(bench: Bench, batch: int) -> Callable[[], object]:
    """torchvision's training step on the same pictures and targets; it updates the same weights in the same precision."""
    scale = bench.scale
    model, ours = peer_model(bench, "mask").train(), bench.model("mask", "cpu")
    for name, weight in model.named_parameters():
        weight.requires_grad_(not name.startswith(("backbone.body.conv1", "backbone.body.layer1")))
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=1e-4, momentum=0.9, weight_decay=1e-4)
    pictures = bench.pictures([scale.equal] * batch)
    targets = []
    for seed in range(batch):
        made = make_target(ours, scale, seed)
        assert isinstance(made.masks, Tensor)
        targets.append({"boxes": made.boxes.to(DEVICE), "labels": made.labels.to(DEVICE), "masks": made.masks.to(DEVICE)})

    def step() -> float:
        with arithmetic("fp32", torch.device(DEVICE)):
            losses = model([picture.to(DEVICE) / 255 for picture in pictures], targets)
            optimizer.zero_grad(set_to_none=True)
            total = torch.stack(list(losses.values())).sum()
            total.backward()
            optimizer.step()
        return float(total)

    return step


def make_target(model: MaskRCNN, scale: Scale, seed: int) -> Target:
    """Rectangles with an ellipse's mask in each, and keypoints where the model has them."""
    generator = torch.Generator().manual_seed(seed)
    height, width = scale.equal
    corner = torch.rand(scale.instances, 2, generator=generator) * torch.tensor([width * 0.6, height * 0.6])
    extent = torch.tensor([width * 0.1, height * 0.1]) * (1 + 2 * torch.rand(scale.instances, 2, generator=generator))
    boxes = torch.cat((corner, corner + extent), dim=1)
    centre, half = (corner + extent / 2)[:, :, None, None], (extent / 2)[:, :, None, None]
    x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    inside = ((x - centre[:, 0]) / half[:, 0]) ** 2 + ((y - centre[:, 1]) / half[:, 1]) ** 2 <= 1
    category = model.config.categories[0]
    count = model.config.num_keypoints
    points = torch.zeros(scale.instances, count, 3)
    points[..., :2], points[..., 2] = (corner + extent / 2)[:, None], 2.0
    return Target(
        boxes,
        torch.full((scale.instances,), category.id),
        inside.byte() if "mask" in model.config.tasks else None,
        points if count else None,
    )


def synchronisations(bench: Bench) -> Iterator[Row]:
    """Where the host waits for the device, in one call of `predict` and one training step, as torch's debug mode tells."""
    scale = bench.scale
    batch = max(size for size in scale.batches if size <= 4)
    pictures, model = bench.pictures([scale.equal] * batch), bench.model("mask")
    step = make_step(bench, scale.steps[0])
    runs: dict[str, Callable[[], object]] = {
        f"predict, {batch} images": lambda: model.predict(pictures, loose(scale, "bf16", batch)),
        f"training step, {scale.steps[0]} images": step,
    }
    for name, run in runs.items():
        run()
        places = waited_for(run)
        yield {"run": name, "synchronisations": sum(places.values()), "places": len(places)}
        for place, count in places.most_common():
            yield {"in": name, "place": place, "times": count}


def waited_for(run: Callable[[], object]) -> collections.Counter[str]:
    """Synchronisations by the line that torch warns of."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    said = [warning for warning in heard if "synchronizing" in str(warning.message)]
    return collections.Counter(f"{short_path(warning.filename)}:{warning.lineno}" for warning in said)


def short_path(path: str) -> str:
    """From the repository's root or the package on; no path of a machine."""
    return re.sub(r".*/(site-packages|dist-packages)/", "", path).replace(f"{ROOT}/", "")


@dataclass(frozen=True)
class Section:
    """A part of the benchmark, and the most seconds it may take."""

    name: str
    title: str
    measure: Callable[[Bench], Iterator[Row]]
    budget_s: float


SECTIONS: Mapping[str, Section] = {
    section.name: section
    for section in (
        Section("machine", "The machine", machine, 25),
        Section("ceilings", "Ceilings: copies and matrix products", ceilings, 25),
        Section("correctness", "Correctness: GPU against CPU, precisions, batch sizes", correctness, 90),
        Section("tests", "The tests of kernels and those marked gpu", gpu_tests, 110),
        Section("roi_align", "RoIAlign beside torchvision", roi_align, 30),
        Section("masks", "Masks to RLE", masks, 20),
        Section("nms", "Suppression", nms, 20),
        Section("predict", "Inference: images a second", predict, 70),
        Section("stages", "Inference by stages", stages, 20),
        Section("profile", "Profiles of a batch in bf16 and of a training step", profile, 30),
        Section("training", "Training steps", training, 50),
        Section("synchronisations", "Host synchronisations", synchronisations, 20),
    )
}
"""In the order in which they run."""
