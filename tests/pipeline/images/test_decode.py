"""Decoding: every kind of image becomes upright 8-bit RGB, and every kind of garbage becomes a status with a reason."""

from __future__ import annotations

import csv
import io
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin
from pydantic import ValidationError

from masklake.pipeline.images.decode import DecodeLimits, decode, read_header
from masklake.pipeline.images.status import Status

# pytest puts its own filters over the one that `decode` sets for its process.
pytestmark = pytest.mark.filterwarnings("ignore")


def picture(width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    """Smooth enough that a JPEG keeps it, and different in every corner."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """(H, W, 3) of what must decode."""
    decoded = decode(data)
    assert decoded.status is Status.OK, decoded.error
    assert decoded.image is not None
    assert decoded.image.dtype == torch.uint8
    assert decoded.image.shape == (3, decoded.height, decoded.width)
    return decoded.image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_formats_give_back_the_pixels(form: str) -> None:
    np.testing.assert_array_equal(pixels(encoded(picture(), form)), np.asarray(picture()))


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF", "GIF", "JPEG2000"])
def test_other_formats_give_what_pillow_gives(form: str) -> None:
    data = encoded(picture(), form)
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(pixels(data), np.asarray(upright))
    decoded = decode(data)
    assert (decoded.width, decoded.height) == ((40, 24) if orientation < 5 else (24, 40))


def test_broken_exif_leaves_the_image_as_it_is() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert pixels(data).shape == (24, 40, 3)


def test_an_orientation_beside_damaged_tags_is_applied() -> None:
    """A width that is a fraction: `ImageOps.exif_transpose` raises, as it cannot write that again."""
    entries = struct.pack("<HHII", 0x0100, 5, 1, 0) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\2\0" + entries + bytes(4))
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(pixels(data), np.rot90(plain, -1))


def test_alpha_is_dropped_and_not_blended() -> None:
    image = picture().convert("RGBA")
    image.putalpha(0)
    np.testing.assert_array_equal(pixels(encoded(image)), np.asarray(picture()))


def test_gray_palette_and_bilevel_become_rgb() -> None:
    gray = picture().convert("L")
    np.testing.assert_array_equal(pixels(encoded(gray)), np.repeat(np.asarray(gray)[:, :, None], 3, axis=2))
    palette = picture().convert("P")
    np.testing.assert_array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
    bilevel = gray.convert("1")
    assert set(np.unique(pixels(encoded(bilevel)))) == {0, 255}


def test_cmyk_becomes_rgb() -> None:
    assert np.abs(pixels(encoded(picture().convert("CMYK"), "TIFF")).astype(int) - np.asarray(picture())).max() <= 1


def test_lab_becomes_rgb() -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(picture(), *profiles, outputMode="LAB")
    assert lab is not None
    assert np.abs(pixels(encoded(lab, "TIFF")).astype(int) - np.asarray(picture())).mean() < 3


def test_sixteen_bits_scale_by_the_bits_in_use() -> None:
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(16, 64)
    full, twelve = Image.fromarray(ramp), Image.fromarray((ramp // 16).astype(np.uint16))
    np.testing.assert_array_equal(pixels(encoded(full))[..., 0], np.rint(ramp / 65535 * 255).astype(np.uint8))
    np.testing.assert_array_equal(pixels(encoded(twelve))[..., 0], np.rint((ramp // 16) / 4095 * 255).astype(np.uint8))


@pytest.mark.parametrize(("values", "expected"), [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.0, 255.0], [0, 100, 255])])
def test_floats_scale_by_their_range(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert pixels(encoded(image, "TIFF"))[0, :, 0].tolist() == expected


def test_floats_beyond_any_convention_scale_by_their_own_range() -> None:
    image = Image.fromarray(np.array([[-10.0, 0.0, 10.0, np.nan]], dtype=np.float32))
    assert pixels(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 128]


def test_the_first_frame_counts() -> None:
    frames = [picture(seed=seed) for seed in (1, 2, 3)]
    data = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(data), np.asarray(frames[0]))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_an_error_and_never_half_an_image(form: str, part: float) -> None:
    data = encoded(picture(200, 160), form)
    decoded = decode(data[: int(len(data) * part)])
    assert decoded.status is Status.DECODE_ERROR
    assert decoded.image is None
    assert decoded.error


@pytest.mark.parametrize("data", [b"", b"not an image", b"<svg></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_says_so(data: bytes) -> None:
    assert decode(data).error == "not an image of a known format"


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds almost none of them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header() -> None:
    for side, size in ((60_000, "3600000000 pixels"), (10_001, "10001 x 10001")):  # beyond Pillow's own limit, and beyond ours
        refused = decode(png_header(side, side))
        assert refused.status is Status.TOO_LARGE
        assert size in (refused.error or "")
        assert "the limit is 100000000 in all" in (refused.error or "")


def test_limits_hold_exactly() -> None:
    data = encoded(picture(40, 24))
    assert decode(data, DecodeLimits(max_pixels=960)).status is Status.OK
    assert decode(data, DecodeLimits(max_pixels=959)).status is Status.TOO_LARGE
    assert decode(data, DecodeLimits(max_side=39)).status is Status.TOO_LARGE
    assert decode(data, DecodeLimits(max_bytes=len(data) - 1)).status is Status.TOO_LARGE


def icon(width: int, height: int, png: bytes) -> bytes:
    """An ICO file that promises one size and holds a PNG of another."""
    directory = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", width, height, 0, 0, 1, 32, len(png), 22)
    return directory + png


def test_the_limit_holds_for_an_image_in_a_container() -> None:
    data = icon(16, 16, encoded(picture(40, 24)))
    assert decode(data, DecodeLimits(max_pixels=960)).status is Status.OK
    refused = decode(data, DecodeLimits(max_pixels=959))
    assert refused.status is Status.TOO_LARGE
    assert "40 x 24" in (refused.error or "")


def test_pillows_limit_in_this_process_is_never_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that labels some images opens others, too."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    decode(encoded(picture(40, 24)), DecodeLimits(max_pixels=10))
    assert Image.MAX_IMAGE_PIXELS == 1000
    decode(encoded(picture(40, 24)), DecodeLimits(max_pixels=5001))
    assert Image.MAX_IMAGE_PIXELS == 2501
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(encoded(picture(40, 24)), DecodeLimits()).status is Status.OK
    assert Image.MAX_IMAGE_PIXELS is None


def test_an_image_without_pixels_is_an_error() -> None:
    assert decode(png_header(0, 10)).status is Status.DECODE_ERROR


def test_the_header_alone_gives_the_size() -> None:
    header = read_header(encoded(picture(40, 24), "JPEG"), DecodeLimits())
    assert (header.status, header.width, header.height, header.pixels) == (Status.OK, 40, 24, 960)


def test_reasons_are_the_same_on_every_run() -> None:
    data = encoded(picture(200, 160))[:900]
    assert decode(data).error == decode(data).error
    assert "0x" not in (decode(b"junk").error or "")


def test_half_transparent_premultiplied_pixels_keep_their_colour() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[338] = 1  # ExtraSamples: associated (premultiplied) alpha
    image = Image.new("RGBA", (2, 2), (100, 50, 25, 128))
    assert pixels(encoded(image, "TIFF", tiffinfo=tags)).shape == (2, 2, 3)


@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 1), value=st.integers(0, 255), form=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"]))
def test_any_damaged_byte_gives_an_image_or_a_reason(position: float, value: int, form: str) -> None:
    data = bytearray(encoded(picture(), form))
    data[min(len(data) - 1, int(position * len(data)))] = value
    decoded = decode(bytes(data))
    assert (decoded.image is None) == (decoded.error is not None) == (decoded.status is not Status.OK)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM"]))
def test_noise_never_raises(noise: bytes, magic: bytes) -> None:
    assert decode(magic + noise).status in (Status.OK, Status.DECODE_ERROR, Status.TOO_LARGE)


def test_every_file_of_the_torture_collection_ends_with_a_status(shared_data: Path) -> None:
    folder = shared_data / "torture"
    rows = list(csv.DictReader((folder / "manifest.csv").open()))
    counts: Counter[str] = Counter()
    for row in rows:
        decoded = decode((folder / row["file"]).read_bytes())
        counts[decoded.status] += 1
        if row["pil_result"].startswith("OPEN"):
            assert decoded.status is not Status.OK, row["file"]
    assert sum(counts.values()) == 689
    assert counts[Status.OK] >= 405  # of 415 that Pillow opens leniently: some are cut off, some beyond our limits
    assert counts[Status.TOO_LARGE] >= 9


def test_a_giant_valid_jpeg_is_refused_by_its_header() -> None:
    giant = encoded(Image.new("L", (10_001, 10_000)), "JPEG")
    refused = decode(giant)
    assert refused.status is Status.TOO_LARGE
    assert "10001 x 10000 pixels" in (refused.error or "")


@pytest.mark.parametrize("limit", ["max_bytes", "max_pixels", "max_side"])
def test_limits_beyond_what_a_row_can_hold_are_refused(limit: str) -> None:
    with pytest.raises(ValidationError, match=limit):
        DecodeLimits(**{limit: 2**63})
