"""Images that cannot be used: found before a run, counted by reason, limited by a share, whose error names the first few."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from masklake.pipeline.coco.dataset import MISSING_FILE, UNUSABLE_IMAGE, CocoDataset
from masklake.pipeline.coco.image_check import check_unusable, listed_and_left_out, unusable_share, usable_images
from masklake.pipeline.coco.reading import parse_coco, read_coco
from masklake.pipeline.errors import AnnotationError, StorageError
from masklake.pipeline.images.decode import DecodeLimits, read_upright
from masklake.pipeline.storage.storage import Storage


def jpeg(width: int, height: int, orientation: int = 1) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def data_of(count: int) -> CocoDataset:
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 30} for n in range(count)]
    boxes = [{"image_id": n, "category_id": 1, "bbox": [2, 2, 9, 9]} for n in range(count)]
    return parse_coco({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}, "x.json")


def write(folder: Path, **files: bytes) -> None:
    for name, data in files.items():
        (folder / f"{name.removeprefix('_')}.jpg").write_bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image of a known format"),
        (b"<html>404</html>", "not an image of a known format"),
        (jpeg(30, 40), "30 x 40 pixels, its annotations are for 40 x 30"),
        (jpeg(40, 30, orientation=6), "30 x 40 pixels, its annotations are for 40 x 30"),
    ],
)
def test_what_a_header_shows_is_found_before_the_run(tmp_path: Path, data: bytes, reason: str) -> None:
    write(tmp_path, _0=jpeg(40, 30), _1=jpeg(30, 40, orientation=8), _2=data)
    with pytest.raises(
        AnnotationError, match=rf"1 of the 3 images of x.json cannot be used: 2.jpg: .*{reason}.*--allow-missing"
    ):
        usable_images(Storage(), data_of(3), str(tmp_path))
    kept = usable_images(Storage(), data_of(3), str(tmp_path), most=0.4)
    assert [image.id for image in kept.images] == [0, 1]
    assert set(kept.annotations) == {0, 1}
    assert kept.dropped == {UNUSABLE_IMAGE: 1}
    assert listed_and_left_out(kept) == (3, 1)


def test_missing_files_are_an_error_or_left_out(tmp_path: Path) -> None:
    write(tmp_path, _0=jpeg(40, 30))
    (tmp_path / "2.jpg").mkdir()
    with pytest.raises(AnnotationError, match=r"2 of the 3 images of x.json are not in .*: 1.jpg, 2.jpg. .*--allow-missing"):
        usable_images(Storage(), data_of(3), str(tmp_path))
    with pytest.raises(AnnotationError, match=r"allow more than 50% .* with --max-unusable"):
        usable_images(Storage(), data_of(3), str(tmp_path), most=0.5)
    assert usable_images(Storage(), data_of(3), str(tmp_path), most=0.7).dropped == {MISSING_FILE: 2}
    with pytest.raises(AnnotationError, match=r"3 of the 3 images of x\.json are not in .* Check the image folder\.$"):
        usable_images(Storage(), data_of(3), str(tmp_path / "elsewhere"), most=1)


def test_one_image_reads_as_one(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"^the only image of x\.json is not in \S+: 0\.jpg\. Check the image folder\.$"):
        usable_images(Storage(), data_of(1), str(tmp_path))
    write(tmp_path, _0=b"")
    with pytest.raises(AnnotationError, match=r"^the only image of x\.json cannot be used: 0\.jpg: .*\. Fix or remove it\.$"):
        usable_images(Storage(), data_of(1), str(tmp_path))


def test_missing_files_do_not_hide_what_else_is_wrong(tmp_path: Path) -> None:
    write(tmp_path, _0=jpeg(40, 30), _1=jpeg(99, 30), _2=b"garbage")
    with pytest.raises(AnnotationError, match=r"is not in .*: 3\.jpg\. .* 2 more cannot be used: 1\.jpg: .*; 2\.jpg: "):
        usable_images(Storage(), data_of(4), str(tmp_path))


def test_none_that_can_be_used_is_an_error_whatever_may_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, _0=b"x", _1=b"y")
    with pytest.raises(AnnotationError, match=r"2 of the 2 images .* cannot be used.*Fix or remove them\.$"):
        usable_images(Storage(), data_of(2), str(tmp_path), most=1)


def test_the_limit_counts_what_was_left_out_before() -> None:
    check_unusable(["a.jpg: cut off"], 10, 0.2, "x.json", already=1)
    with pytest.raises(AnnotationError, match=r"3 of the 10 images of x.json .*: a.jpg: cut off; b.jpg: gone; and 1 more"):
        check_unusable(["a.jpg: cut off", "b.jpg: gone"], 10, 0.2, "x.json", already=1)
    assert [unusable_share(*given) for given in ((False, None), (True, None), (False, 0.3), (True, 0.0))] == [0, 0.05, 0.3, 0]


def test_a_store_that_is_down_is_no_images_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: Any) -> Any:
        raise OSError("Server returned error status code: 503 Service Unavailable")

    monkeypatch.setattr("masklake.pipeline.coco.image_check.obstore.head", busy)
    monkeypatch.setattr(Storage, "object_store", lambda storage, uri: (None, "key"))
    with pytest.raises(StorageError, match="the store is overloaded"):
        usable_images(Storage(), data_of(2), "s3://b/in", most=1)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_other_formats_may_still_turn(form: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, form)
    header = read_upright(buffer, DecodeLimits())
    assert (header.width, header.height, header.upright) == (40, 30, False)


def test_remote_images_are_judged_by_their_first_bytes(s3: Any) -> None:
    noise = jpeg(40, 30) + b"\0" * 20_000
    for name, data in {"0": noise, "1": jpeg(30, 40), "2": b"", "3": b"x" * 20_000}.items():
        s3.client.put_object(Bucket=s3.bucket, Key=f"in/{name}.jpg", Body=data)
    kept = usable_images(Storage(), data_of(5), f"s3://{s3.bucket}/in", most=0.7)
    assert [image.id for image in kept.images] == [0, 3]  # the loader finds the last
    assert kept.dropped == {MISSING_FILE: 1, UNUSABLE_IMAGE: 2}


def test_a_manifest_that_names_absent_images_is_caught(shared_data: Path) -> None:
    folder = shared_data / "brain_tumor_mri"
    dataset = read_coco(Storage(), str(folder / "derived" / "validation_coco.json"))
    with pytest.raises(AnnotationError, match="8 of the 8 images"):
        usable_images(Storage(), dataset, str(folder / "test"), most=0.9)
