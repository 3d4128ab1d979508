"""Edges of pasted masks: the Triton kernel, the reference and the CPU's encoder give the same runs, bit for bit.

In Triton's interpreter everywhere, on the GPU where there is one. The interpreter takes milliseconds a row: images are small,
and large boxes lie mostly outside.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchvision.models.detection.roi_heads import paste_masks_in_image

pytest.importorskip("triton")

import masklake
from masklake.model.kernels import mask_rle
from masklake.model.kernels.layout import warn_once
from masklake.model.kernels.mask_rle import choose_path, mask_edges
from masklake.model.kernels.mask_rle_reference import mask_edges_reference
from masklake.model.kernels.mask_rle_triton import mask_edges_triton
from masklake.model.masks import rle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
fused_like_ours = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="elsewhere torch's own resizing rounds otherwise, and decides pixels on the threshold otherwise",
)
LEVELS = [float(np.float32(level)) for level in (0.0, 0.25, 0.4999999, 0.5, 0.50000006, 0.75, 1.0, np.nan)]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_filled() -> Iterator[None]:
    """What no program writes would hold the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatch point as on a GPU."""
    monkeypatch.setattr(mask_rle, "choose_path", lambda device: "triton")


def assert_all_equal(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], threshold: float = 0.5) -> None:
    """The kernel's edges are the reference's, and encode to what the CPU's encoder gives."""
    sizes = torch.tensor([size], dtype=torch.int64).expand(len(masks), 2)
    room = size[0] * size[1] * len(masks)
    expected = mask_edges_reference(masks, boxes, sizes, threshold, size[1], room)
    found = mask_edges_triton(masks.to(DEVICE), boxes.to(DEVICE), sizes.to(DEVICE), threshold, size[1], room)
    assert found[0].tolist() == expected[0].tolist()
    assert torch.equal(found[1].cpu(), expected[1])
    edges, pixels = expected[1][: expected[0].sum()].numpy(), np.full(len(masks), size[0] * size[1])
    packed, areas = rle.pack_edges(edges, expected[0].numpy(), pixels)
    counts, expected_areas = rle.encode_boxed_masks(masks.cpu(), boxes.cpu(), size, threshold)
    assert packed == counts
    assert areas.tolist() == expected_areas.tolist()


@fused_like_ours
@settings(max_examples=30, deadline=None)
@given(
    masks=hnp.arrays(np.float32, (2, 5, 5), elements=st.sampled_from(LEVELS)),
    corners=hnp.arrays(np.float32, (2, 4), elements=st.floats(-30, 40, width=32)),
    size=st.tuples(st.integers(1, 8), st.integers(1, 24)),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_equal_where_rounding_decides(masks: np.ndarray, corners: np.ndarray, size: tuple[int, int], threshold: float) -> None:
    """Values on the threshold and no numbers, boxes of no or negative size, images of one pixel, several programs a mask."""
    assert_all_equal(torch.from_numpy(masks), torch.from_numpy(corners), size, threshold)


@fused_like_ours
@pytest.mark.parametrize("side", [1, 14, 28])
def test_equal_in_large_boxes(side: int) -> None:
    """Sides that sum to more than 128, which torch resizes by other code; and as large as the padded mask, which it copies."""
    generator = torch.Generator().manual_seed(side)
    masks = torch.randint(0, 5, (6, side, side), generator=generator) / 4.0
    corner = -torch.rand(6, 2, generator=generator) * 150
    boxes = torch.cat((corner, corner + 150 + 100 * torch.rand(6, 2, generator=generator)), dim=1)
    boxes[0] = torch.tensor([-3.0, -4, -3 + side, -4 + side])
    boxes[1] = torch.tensor([2.0, -1000, 2 + side, 1000])
    assert_all_equal(masks, boxes, (12, 20))


def test_equal_to_torchvision_and_pycocotools() -> None:
    """With a mask that fills its image, whose runs go on from each column's foot to the next one's head."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 7, 7, generator=generator)
    masks[2] = 1
    boxes = torch.tensor([[2.0, 1, 30, 10], [0, 0, 39, 11], [-90, -90, 120, 120]])
    pasted = (paste_masks_in_image(masks[:, None], boxes, (12, 40)) > 0.5).numpy()[:, 0].astype(np.uint8)
    edges = mask_edges_triton(masks.to(DEVICE), boxes.to(DEVICE), torch.tensor([[12, 40]] * 3).to(DEVICE), 0.5, 40, 1000)
    total = int(edges[0].sum())
    packed, _ = rle.pack_edges(edges[1][:total].cpu().numpy(), edges[0].cpu().numpy(), np.full(3, 480))
    assert packed == [coco_mask.encode(np.asfortranarray(bitmap))["counts"] for bitmap in pasted]
    assert edges[0].tolist()[2] == 1, "one run from the first pixel to the last"


def test_boxes_without_pixels_have_no_edges() -> None:
    boxes = torch.tensor(
        [[500.0, 500, 600, 600], [-90, -90, -50, -50], [float("nan"), 0, 5, 5], [0, 0, float("inf"), 5], [1e30, 0, -1e30, 5]]
    )
    assert_all_equal(torch.ones(5, 4, 4), boxes, (9, 8))
    sizes = torch.tensor([[9, 8]] * 5, device=DEVICE)
    assert not mask_edges_triton(torch.ones(5, 4, 4, device=DEVICE), boxes.to(DEVICE), sizes, 0.5, 8, 10)[0][:4].any()


def test_images_of_a_batch_have_their_own_sizes() -> None:
    masks, boxes = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([[1.0, 1, 12, 7]]).repeat(3, 1)
    sizes = torch.tensor([[8, 14], [5, 9], [20, 3]])
    expected = mask_edges_reference(masks, boxes, sizes, 0.5, 14, 300)
    found = mask_edges_triton(masks.to(DEVICE), boxes.to(DEVICE), sizes.to(DEVICE), 0.5, 14, 300)
    assert found[0].tolist() == expected[0].tolist()
    assert found[1].tolist() == expected[1].tolist()


def test_positions_beyond_32_bits() -> None:
    """An image of three columns and more than 2 ** 32 pixels."""
    size, boxes = (2**31 + 11, 3), torch.tensor([[0.0, 9.0e8, 2, 9.0e8]])
    masks, sizes = torch.ones(1, 3, 3), torch.tensor([size])
    found = mask_edges_triton(masks.to(DEVICE), boxes.to(DEVICE), sizes.to(DEVICE), 0.1, 3, 50)
    packed, areas = rle.pack_edges(found[1][: found[0].sum()].cpu().numpy(), found[0].cpu().numpy(), np.array([size[0] * 3]))
    expected, expected_areas = rle.encode_boxed_masks(masks, boxes, size, 0.1)
    assert packed == expected
    assert areas.tolist() == expected_areas.tolist()
    assert found[1].max() > 2**32


def test_memory_order_and_dtype_of_masks_do_not_matter() -> None:
    masks = (torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(2)) * 16).round() / 16  # exact in every dtype
    boxes, sizes = torch.tensor([[1.0, 1, 12, 7], [3, 0, 6, 20]]).to(DEVICE), torch.tensor([[9, 14]] * 2).to(DEVICE)
    expected = mask_edges_triton(masks.to(DEVICE), boxes, sizes, 0.4, 14, 200)
    turned = masks.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (turned, masks.bfloat16(), masks.half(), masks.double()):
        found = mask_edges_triton(other.to(DEVICE), boxes, sizes, 0.4, 14, 200)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_less_room_than_edges() -> None:
    masks, boxes = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(3)), torch.tensor([[0.0, 0, 11, 7]]).repeat(2, 1)
    arguments = (masks.to(DEVICE), boxes.to(DEVICE), torch.tensor([[9, 14]] * 2).to(DEVICE), 0.5, 14)
    counts, edges = mask_edges_triton(*arguments, 200)
    few = mask_edges_triton(*arguments, 10)
    assert counts.sum() > 10
    assert torch.equal(few[0], counts)
    assert torch.equal(few[1], edges[:10])


def test_many_masks_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, boxes = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(6)), torch.tensor([[0.0, 0, 9, 6]]).repeat(3, 1)
    arguments = (masks.to(DEVICE), boxes.to(DEVICE), torch.tensor([[8, 12]] * 3).to(DEVICE), 0.5, 12, 60)
    whole = mask_edges_triton(*arguments)
    monkeypatch.setattr("masklake.model.kernels.mask_rle_triton.MAX_STRETCHES", 2 * 12 * 8)
    for part, expected in zip(mask_edges_triton(*arguments), whole, strict=True):
        assert torch.equal(part, expected)


@pytest.mark.usefixtures("through_triton")
def test_no_masks() -> None:
    none = mask_edges(torch.zeros(0, 7, 7), torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64), 0.5, 10, 0)
    assert [part.shape for part in none] == [(0,), (0,)]


@pytest.mark.usefixtures("through_triton")
@pytest.mark.parametrize("per_column", [1, 0])
def test_encoded_on_the_device_as_on_the_cpu(per_column: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several images at once, with room for all edges and without; what else is wanted comes along."""
    monkeypatch.setattr(rle, "EDGES_PER_COLUMN", per_column)
    generator = torch.Generator().manual_seed(4)
    masks, sizes = torch.rand(4, 5, 5, generator=generator), [(9, 14), (12, 10)]
    boxes = torch.tensor([[1.0, 1, 12, 7], [-3, 0, 6, 20], [2, 2, 7, 8], [0, 0, 9, 11]])
    images, beside = torch.tensor([0, 0, 1, 1]), torch.rand(4, 3, generator=generator)
    on_device = (t.to(DEVICE) for t in (masks, boxes, images))
    counts, areas, brought = rle.encode_on_device(*on_device, sizes, 0.5, beside.to(DEVICE))
    first, second = (rle.encode_boxed_masks(masks[i : i + 2], boxes[i : i + 2], sizes[i // 2]) for i in (0, 2))
    assert counts == first[0] + second[0]
    assert areas.tolist() == [*first[1], *second[1]]
    assert torch.equal(brought, beside)
    assert brought.device.type == "cpu"


def operator_arguments() -> tuple[object, ...]:
    masks = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    boxes = torch.tensor([[1.0, 1, 6, 4], [0, 0, 3, 5]]).to(DEVICE)
    return masks, boxes, torch.tensor([[6, 8], [6, 5]]).to(DEVICE), 0.5, 8, 40


@pytest.mark.usefixtures("through_triton")
def test_registered_operator_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.masklake.mask_edges.default, operator_arguments())


@pytest.mark.usefixtures("through_triton")
def test_compiles_into_one_graph() -> None:
    arguments = operator_arguments()
    compiled = torch.compile(mask_edges, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*arguments), mask_edges_triton(*arguments), strict=True):
        assert torch.equal(ours, expected)


def test_other_devices_fall_back_with_one_warning() -> None:
    warn_once.cache_clear()
    assert choose_path("cuda") == "triton"
    with pytest.warns(UserWarning, match="falling back to the slow reference") as caught:
        assert choose_path("xpu") == choose_path("xpu") == "reference"
    assert len(caught) == 1


def test_shapes_that_do_not_fit_are_refused() -> None:
    masks, boxes, sizes = torch.zeros(2, 4, 4), torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.int64)
    for bad in ((masks[:, :3], boxes, sizes), (masks, boxes[:1], sizes), (masks, boxes, sizes[0])):
        with pytest.raises(ValueError, match=r"masks must be \(N, m, m\)"):
            mask_edges(*bad, 0.5, 5, 5)
    with pytest.raises(ValueError, match="need a pixel"):
        mask_edges(masks, boxes, sizes, 0.5, 0, 5)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from masklake.model.kernels import mask_rle_triton as kernels

pointers = {"masks": "*fp32", "regions": "*i64", "counts": "*i32", "ends": "*i64", "edges": "*i64", "threshold": "fp32"}
for write in (False, True):
    constants = {"SIDE": 28, "WRITE": write, "COLUMNS": 16, "STRETCHES": 8}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernels._walk_kernel.arg_names
    }
    source = ASTSource(fn=kernels._walk_kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    ptx = compiled.asm["ptx"]
    assert compiled.asm["cubin"]
    assert "div.rn.f32" in ptx
    assert "fma.rn.f32" not in ptx, "a product and a sum of float32 were fused"
    assert ".ftz" not in ptx
"""


@pytest.mark.slow
def test_kernel_compiles_for_an_h100_without_one_and_rounds_as_torch_does(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(masklake.__file__).parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
