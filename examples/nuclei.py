"""Turns the nuclei of the 2018 Data Science Bowl into two COCO files, by a split that follows from a seed.

    python examples/nuclei.py stage1_train --output nuclei              # <id>/images/<id>.png and <id>/masks/*.png
    python examples/nuclei.py nuclei_coco.json --output nuclei          # one COCO file of all images

Writes `train.json` and `val.json` to the output folder. From the public layout the images are linked into `images/` there (or
copied where links are not possible); a COCO file's images stay where they are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
from PIL import Image

NUCLEUS = {"id": 1, "name": "nucleus", "supercategory": "cell"}


def read_layout(folder: Path, images: Path) -> dict[str, Any]:
    """The public layout as a COCO document; every mask file is one nucleus."""
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": [NUCLEUS]}
    images.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(sorted(folder.glob("*/images/*.png")), start=1):
        with Image.open(picture) as image:
            width, height = image.size
        document["images"].append({"id": number, "file_name": picture.name, "width": width, "height": height})
        for mask in sorted((picture.parents[1] / "masks").glob("*.png")):
            row = read_mask(mask, (height, width))
            document["annotations"].append({"id": len(document["annotations"]) + 1, "image_id": number, **row})
        place(picture, images / picture.name)
    if not document["images"]:
        raise SystemExit(f"{folder} holds no <id>/images/<id>.png; give the unpacked stage1_train folder")
    return document


def read_mask(path: Path, size: tuple[int, int]) -> dict[str, Any]:
    """One nucleus: its run-length encoding, and the box and area that follow from it."""
    with Image.open(path) as image:
        bitmap = np.asarray(image.convert("L")) > 127
    if bitmap.shape != size:
        raise SystemExit(f"{path} is {bitmap.shape[1]} x {bitmap.shape[0]} pixels, its image {size[1]} x {size[0]}")
    rle = pycocotools.mask.encode(np.asfortranarray(bitmap, dtype=np.uint8))
    area, box = int(pycocotools.mask.area(rle)), pycocotools.mask.toBbox(rle).tolist()
    segmentation = {"size": list(size), "counts": rle["counts"].decode()}
    return {"category_id": 1, "iscrowd": 0, "bbox": box, "area": area, "segmentation": segmentation}


def place(source: Path, target: Path) -> None:
    """Links `source` into the data set, or copies it."""
    target.unlink(missing_ok=True)
    try:
        os.symlink(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def split(document: dict[str, Any], share: float, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Training and validation documents: the names in order, shuffled by the seed; the first `share` of them validate."""
    names = sorted(image["file_name"] for image in document["images"])
    random.Random(seed).shuffle(names)
    held_out = set(names[: round(share * len(names))])
    return part(document, set(names) - held_out), part(document, held_out)


def part(document: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The document's images of these names, and their annotations."""
    images = [image for image in document["images"] if image["file_name"] in names]
    ids = {image["id"] for image in images}
    annotations = [row for row in document["annotations"] if row["image_id"] in ids]
    return {"images": images, "annotations": annotations, "categories": document["categories"]}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Nuclei of the 2018 Data Science Bowl as COCO files.")
    parser.add_argument("source", type=Path, help="folder of the public layout, or a COCO JSON file")
    parser.add_argument("--output", type=Path, default=Path("nuclei"), help="folder to write to (default: nuclei)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    parser.add_argument("--val-share", type=float, default=0.2, help="share of the images to score on (default: 0.2)")
    options = parser.parse_args()
    try:
        prepare(options)
    except (OSError, ValueError, KeyError, TypeError) as error:  # a path, or a file that is not COCO's
        raise SystemExit(f"cannot prepare {options.source}: {type(error).__name__}: {error}") from error


def prepare(options: argparse.Namespace) -> None:
    """Writes `train.json` and `val.json`, and says what they hold."""
    if not options.source.exists():
        raise SystemExit(f"{options.source} does not exist; give the unpacked stage1_train folder, or a COCO JSON file")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.source.is_dir():
        document = read_layout(options.source, options.output / "images")
    else:
        document = json.loads(options.source.read_text())
    for name, half in zip(("train", "val"), split(document, options.val_share, options.seed), strict=True):
        path = options.output / f"{name}.json"
        path.write_text(json.dumps(half))
        print(f"{path}: {len(half['images'])} images, {len(half['annotations'])} nuclei")


if __name__ == "__main__":
    main()
