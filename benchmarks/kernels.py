"""RoIAlign, keypoint decoding, convolutions and (on a GPU) CUDA peers: ours against torch and torchvision, at FPN's shapes.

    python -m benchmarks.kernels [--repeats 7]

Prints the tables, appends to results/kernels.csv and writes a dated report. On a CPU: 1000 RoIs x 256 channels x 7 x 7,
sampling 2, on P2 to P5 of an 800 x 1333 image, building of indices included. On CUDA: the same with a batch of 8 images
and 8000 RoIs in bfloat16 channels_last, with the bandwidth of a plain copy beside it; and 100 masks to RLE on the host.
torchvision's CUDA operator has no bfloat16: it runs in float16, which moves as many bytes, and in float32, which is what
autocast gives it.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints
from torchvision.ops import roi_align as torchvision_roi_align

from benchmarks.record import Timing, record, report, side_by_side, table
from benchmarks.rle import DETECTIONS, detections, paste_and_encode
from masklake.model.heads.keypoint_decoding import decode_heatmaps
from masklake.model.kernels.roi_align import roi_align
from masklake.model.kernels.winograd import WinogradConv
from masklake.model.masks.rle import encode_boxed_masks

STRIDES = (4, 8, 16, 32)
SCALES = tuple(1 / stride for stride in STRIDES)
CANVAS = (800, 1344)  # an 800 x 1333 image on its canvas
CHANNELS = 256
BINS = 7
BURST = 10


@dataclass(frozen=True)
class Scene:
    """Feature levels, RoIs (R, 5) and their levels (R,)."""

    features: list[torch.Tensor]
    rois: torch.Tensor
    levels: torch.Tensor

    def cast(self, dtype: torch.dtype, channels_last: bool) -> Scene:
        """The same with features of another dtype and order of memory, as leaves that take gradients."""
        order = torch.channels_last if channels_last else torch.contiguous_format
        features = [f.detach().to(dtype).contiguous(memory_format=order).requires_grad_() for f in self.features]
        return Scene(features, self.rois, self.levels)


def proposals(images: int, each: int, seed: int = 0, canvas: tuple[int, int] = CANVAS) -> tuple[torch.Tensor, torch.Tensor]:
    """RoIs like an RPN's and their levels: scales spread evenly in their logarithm from 16 to 800 pixels."""
    generator = torch.Generator().manual_seed(seed)
    count = images * each
    uniform = torch.rand(4, count, generator=generator)
    scale = torch.exp(math.log(16) + uniform[0] * math.log(50))
    aspect = torch.exp((uniform[1] * 2 - 1) * math.log(2))
    box_w, box_h = (scale * aspect.sqrt()).clamp(max=canvas[1]), (scale / aspect.sqrt()).clamp(max=canvas[0])
    x, y = uniform[2] * (canvas[1] - box_w), uniform[3] * (canvas[0] - box_h)
    image = torch.arange(images).repeat_interleave(each).float()
    levels = (4 + torch.log2((box_w * box_h).sqrt() / 224 + 1e-6)).floor().clamp(2, 5).long() - 2
    return torch.stack((image, x, y, x + box_w, y + box_h), dim=1), levels


def scene(
    images: int,
    each: int,
    device: str,
    finest_only: bool = False,
    canvas: tuple[int, int] = CANVAS,
    channels: int = CHANNELS,
) -> Scene:
    """Random features of all levels, and proposals; ``finest_only`` puts all RoIs on P2, the worst case for caches."""
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(images, channels, canvas[0] // s, canvas[1] // s, generator=generator).to(device) for s in STRIDES]
    rois, levels = proposals(images, each, canvas=canvas)
    return Scene(features, rois.to(device), (levels * (not finest_only)).to(device))


def ours(inputs: Scene) -> torch.Tensor:
    """All levels in one call."""
    return roi_align(inputs.features, inputs.rois, inputs.levels, SCALES, BINS)


def peers(inputs: Scene) -> torch.Tensor:
    """torchvision's operator level by level, gathered as its MultiScaleRoIAlign does."""
    feature = inputs.features[0]
    pooled = feature.new_zeros((len(inputs.rois), feature.shape[1], BINS, BINS))
    for level, scale in enumerate(SCALES):
        chosen = torch.where(inputs.levels == level)[0]
        rois = inputs.rois[chosen].to(feature.dtype)
        pooled[chosen] = torchvision_roi_align(inputs.features[level], rois, BINS, scale, 2)
    return pooled


def with_backward(run: Callable[[Scene], torch.Tensor], inputs: Scene) -> Callable[[], None]:
    """Forward and backward, gradients discarded."""

    def both() -> None:
        pooled = run(inputs)
        torch.autograd.grad(pooled, [f for f in inputs.features if f.requires_grad], torch.ones_like(pooled), allow_unused=True)

    return both


def inference(run: Callable[[Scene], torch.Tensor], inputs: Scene) -> Callable[[], None]:
    """Forward alone."""

    def forward() -> None:
        with torch.inference_mode():
            run(inputs)

    return forward


def row(name: str, mine: Timing, peer: Timing, **extra: object) -> dict[str, object]:
    """One line of the table."""
    return {
        "case": name,
        "ours_ms": f"{mine.median * 1e3:.2f}",
        "ours_spread": f"{mine.spread:.0%}",
        "torchvision_ms": f"{peer.median * 1e3:.2f}",
        "peer_spread": f"{peer.spread:.0%}",
        "ratio": f"{peer.median / mine.median:.1f}",
        **extra,
    }


def roi_align_on_cpu(repeats: int) -> list[dict[str, object]]:
    """Our float32 and bfloat16 against torchvision's float32 in its own best order of memory (NCHW)."""
    rows = []
    for where, finest_only in (("P2-P5", False), ("P2 alone", True)):
        base = scene(1, 1000, "cpu", finest_only)
        plain, last, half = base.cast(torch.float32, False), base.cast(torch.float32, True), base.cast(torch.bfloat16, True)
        times = side_by_side(
            {
                "peer": inference(peers, plain),
                "fp32": inference(ours, last),
                "fp32 NCHW": inference(ours, plain),
                "bf16": inference(ours, half),
                "peer both": with_backward(peers, plain),
                "fp32 both": with_backward(ours, last),
                "bf16 both": with_backward(ours, half),
            },
            repeats,
        )
        rows += [
            row(f"RoIAlign {where}, fp32 channels_last", times["fp32"], times["peer"]),
            row(f"RoIAlign {where}, fp32 NCHW", times["fp32 NCHW"], times["peer"]),
            row(f"RoIAlign {where}, bf16 channels_last", times["bf16"], times["peer"]),
            row(f"RoIAlign {where}, fp32 forward + backward", times["fp32 both"], times["peer both"]),
            row(f"RoIAlign {where}, bf16 forward + backward", times["bf16 both"], times["peer both"]),
        ]
    return rows


def keypoints(repeats: int) -> list[dict[str, object]]:
    """100 people of 55 to 660 pixels' height, 17 keypoints: peaks with lower ones beside them, as a trained head's."""
    generator = torch.Generator().manual_seed(2)
    axis = torch.arange(56.0)
    maps = torch.full((100, 17, 56, 56), -4.0)
    for height, width in ((12.0, 2.5), (8.0, 2.5), (5.0, 4.0)):
        at = torch.rand(100, 17, 2, 1, generator=generator) * 54
        gauss = torch.exp(-((axis - at) ** 2) / (2 * width**2))
        maps += height * gauss[:, :, 0, :, None] * gauss[:, :, 1, None, :]
    box_h = torch.exp(4 + torch.rand(100, generator=generator) * 2.5)
    box_w = box_h * (0.3 + 0.5 * torch.rand(100, generator=generator))
    corner = torch.rand(100, 2, generator=generator) * 300
    boxes = torch.cat((corner, corner + torch.stack((box_w, box_h), dim=1)), dim=1)
    runs = {"ours": lambda: decode_heatmaps(maps, boxes), "peer": lambda: heatmaps_to_keypoints(maps, boxes)}
    times = side_by_side(runs, repeats)
    return [row("keypoint decoding, 100 people", times["ours"], times["peer"])]


def convolutions(repeats: int) -> list[dict[str, object]]:
    """The 3x3 convolutions that cost most, on P2 and in the mask branch, beside torch's own (channels last, as ours)."""
    rows = []
    for where, shape in (("P2", (1, CHANNELS, 200, 336)), ("100 masks", (100, CHANNELS, 14, 14))):
        conv = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1).to(memory_format=torch.channels_last)
        layer, x = WinogradConv(conv), torch.randn(shape).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            times = side_by_side({"ours": lambda layer=layer, x=x: layer(x), "peer": lambda conv=conv, x=x: conv(x)}, repeats)
        rows.append(row(f"3x3 convolution of {CHANNELS} channels, {where}, fp32", times["ours"], times["peer"]))
    return rows


def backward(run: Callable[[Scene], torch.Tensor], inputs: Scene) -> Callable[[], None]:
    """The gradients alone, of a forward pass that is kept."""
    leaves = [f for f, wanted in zip(inputs.features, used_levels(inputs), strict=True) if wanted]
    pooled = run(inputs)
    grad = torch.ones_like(pooled)

    def back() -> None:
        torch.autograd.grad(pooled, leaves, grad, retain_graph=True)

    return back


def used_levels(inputs: Scene) -> list[bool]:
    """Which levels have RoIs."""
    return [bool((inputs.levels == level).any()) for level in range(len(inputs.features))]


def in_bursts(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """`side_by_side` of runs so short that waiting for the device would count: ten in a row, and a tenth of their time."""

    def burst(run: Callable[[], object]) -> Callable[[], None]:
        def ten() -> None:
            for _ in range(BURST):
                run()

        return ten

    times = side_by_side({name: burst(run) for name, run in runs.items()}, repeats)
    return {name: Timing(tuple(seconds / BURST for seconds in timing.seconds)) for name, timing in times.items()}


def copy_bandwidth(device: str, repeats: int, elements: int = 1 << 28) -> float:
    """Bytes a second that a plain copy (of 1 GiB) moves, reading and writing."""
    source = torch.empty(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / in_bursts({"copy": lambda: target.copy_(source)}, repeats)["copy"].median


def touched_bytes(inputs: Scene) -> int:
    """Unique feature bytes that the RoIs read, plus the bytes they write: what no implementation can avoid."""
    marks = Scene(
        [torch.zeros_like(f[:, :1], dtype=torch.float32).requires_grad_() for f in inputs.features], inputs.rois, inputs.levels
    )
    pooled = roi_align(marks.features, marks.rois, marks.levels, SCALES, BINS)
    pixels = sum(int((g != 0).sum()) for g in torch.autograd.grad(pooled.sum(), marks.features))
    first = inputs.features[0]
    return (pixels + len(inputs.rois) * BINS * BINS) * first.shape[1] * first.element_size()


def relative_error(base: Scene) -> float:
    """Ours in bfloat16 against torchvision in float32 on the same values, root of the summed squares."""
    half = base.cast(torch.bfloat16, True)
    with torch.inference_mode():
        exact = peers(half.cast(torch.float32, False))
        return float((ours(half).float() - exact).norm() / exact.norm())


def roi_align_roofline(base: Scene, bandwidth: float, repeats: int) -> list[dict[str, object]]:
    """bfloat16 channels_last against torchvision in its own best order of memory (NCHW), and the share of ``bandwidth``."""
    half, peer_half, peer_full = (
        base.cast(torch.bfloat16, True),
        base.cast(torch.float16, False),
        base.cast(torch.float32, False),
    )
    error, touched = relative_error(base), touched_bytes(half)
    rows = []
    for what, pass_of, wanted in (("forward", inference, 1.5), ("backward", backward, 2.0)):
        times = in_bursts(
            {"ours": pass_of(ours, half), "fp16": pass_of(peers, peer_half), "fp32": pass_of(peers, peer_full)}, repeats
        )
        share = f"{touched / times['ours'].median / bandwidth:.0%}"
        for peer in ("fp16", "fp32"):
            name = f"RoIAlign {what}, bf16 against torchvision in {peer}"
            extra = {"wanted": wanted, "of_copy_bandwidth": share, "copy_GB_s": f"{bandwidth / 1e9:.0f}"}
            agreement = f"relative error {error:.1e}" if what == "forward" else ""
            rows.append(row(name, times["ours"], times[peer], **extra, touched_MB=f"{touched / 1e6:.0f}", agreement=agreement))
    return rows


def roi_align_on_cuda(repeats: int) -> list[dict[str, object]]:
    """P2 to P5 of eight 800 x 1333 images, 1000 RoIs each."""
    return roi_align_roofline(scene(8, 1000, "cuda"), copy_bandwidth("cuda", repeats), repeats)


def masks_to_host(device: str, size: tuple[int, int], repeats: int, count: int = DETECTIONS) -> list[dict[str, object]]:
    """``count`` masks from the device to RLE on the host; the peer pastes on the device, as torchvision does."""
    on_host = detections(size, count=count)
    probs, boxes = (t.to(device) for t in on_host)
    runs = {"ours": lambda: encode_boxed_masks(probs, boxes, size), "peer": lambda: paste_and_encode(probs, boxes, size)}
    found, others = runs["ours"]()[0], (encode_boxed_masks(*on_host, size)[0], runs["peer"]())
    same = [sum(a == b for a, b in zip(found, other, strict=True)) for other in others]
    times = side_by_side(runs, repeats)
    agreement = f"{same[0]}/{len(found)} as on the CPU, {same[1]} as the peer"
    name = f"masks to RLE on the host, {len(found)} at {size[0]}x{size[1]}"
    return [row(name, times["ours"], times["peer"], wanted=20, agreement=agreement)]


def masks_on_cuda(repeats: int) -> list[dict[str, object]]:
    """100 detections of an 800 x 1333 image."""
    return masks_to_host("cuda", (800, 1333), repeats)


def main() -> None:
    """Measure what this machine can run, print, record and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="measured runs of each side")
    repeats = parser.parse_args().repeats
    parts: Sequence[Callable[[int], list[dict[str, object]]]] = (roi_align_on_cpu, keypoints, convolutions)
    if torch.cuda.is_available():
        parts = (roi_align_on_cuda, masks_on_cuda)
    # Each in a process of its own: in a heap that others have used, large blocks find fewer huge pages, and our convolutions
    # took 1.4 times as long.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        rows = [line for part in parts for line in processes.submit(part, repeats).result()]
    print(table(rows))
    for line in rows:
        record("kernels", line)
    name = "kernels-gpu" if torch.cuda.is_available() else "kernels-cpu"
    print(f"report: {report(name, 'Kernels against torchvision', rows).name}")


if __name__ == "__main__":
    main()
