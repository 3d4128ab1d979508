"""A checked COCO data set: its images, categories and annotations, and what was left out of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from masklake.model.config import Category
from masklake.model.wording import agreeing, counted, counted_of
from masklake.pipeline.coco.fields import MOST_UNUSABLE
from masklake.pipeline.coco.values import CocoImage, Segmentation
from masklake.pipeline.errors import AnnotationError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import canonical, parent

NAMED = 5
"""Maximum number of offenders that an error message names; it counts the others."""

REPEATED_IMAGE, REPEATED_ROW = "repeated image rows", "repeated annotation rows"
ZERO_AREA, OUTSIDE = "boxes without an area", "boxes outside their image"
MISSING_FILE, UNUSABLE_IMAGE = "images without a file", "images that cannot be used"
_ONE = {
    REPEATED_IMAGE: "repeated image row",
    REPEATED_ROW: "repeated annotation row",
    ZERO_AREA: "box without an area",
    OUTSIDE: "box outside its image",
    MISSING_FILE: "image without a file",
    UNUSABLE_IMAGE: "image that cannot be used",
}
DROPPED_INSTANCES = (ZERO_AREA, OUTSIDE)
"""Reasons for leaving out an annotation that somebody drew."""


@dataclass(frozen=True, slots=True)
class CocoAnnotation:
    """One row of `annotations`. bbox: x, y, width, height in pixels. keypoints: x, y, visibility of each keypoint, flat."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float
    crowd: bool
    segmentation: Segmentation
    keypoints: tuple[float, ...] = ()


@dataclass(frozen=True)
class CocoDataset:
    """A checked COCO file.

    `annotations` holds the annotations by image id, crowds included. `dropped` counts what was left out, by reason; `examples`
    names the first few.
    """

    source: str
    categories: tuple[Category, ...]
    images: tuple[CocoImage, ...]
    annotations: Mapping[int, tuple[CocoAnnotation, ...]]
    dropped: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)

    @property
    def has_masks(self) -> bool:
        """Whether any instance has an outline."""
        return any(a.segmentation is not None for a in self._instances())

    @property
    def has_keypoints(self) -> bool:
        """Whether any category defines keypoints."""
        return any(category.keypoints for category in self.categories)

    def instance_count(self) -> int:
        """Returns the number of annotations that are not crowd regions."""
        return sum(1 for _ in self._instances())

    def without_outline(self) -> int:
        """Returns the number of instances with a box but no mask; they are used for everything but masks."""
        return sum(a.segmentation is None for a in self._instances())

    def without_keypoints(self) -> int:
        """Returns the number of instances of categories with keypoints that have none visible or hidden; they are used for
        everything else.
        """
        named = {category.id for category in self.categories if category.keypoints}
        return sum(a.category_id in named and not any(a.keypoints[2::3]) for a in self._instances())

    def incomplete(self) -> dict[str, int]:
        """Returns the numbers of instances that lack the ground truth of a task that the data set has, by what they lack."""
        lacking = {
            "without an outline": self.without_outline() if self.has_masks else 0,
            "without keypoints": self.without_keypoints(),
        }
        return {what: count for what, count in lacking.items() if count}

    def _instances(self) -> Iterator[CocoAnnotation]:
        return (a for rows in self.annotations.values() for a in rows if not a.crowd)


def learnable(annotation: CocoAnnotation, image: CocoImage) -> bool:
    """Returns whether an instance is used in training: it is not a crowd region, and the part of its box on the image is at
    least one pixel wide and high.
    """
    x, y, width, height = annotation.bbox
    wide, high = min(x + width, image.width) - max(x, 0), min(y + height, image.height) - max(y, 0)
    return not annotation.crowd and wide >= 1 and high >= 1


def without_images(dataset: CocoDataset, image_ids: Collection[int], reason: str) -> CocoDataset:
    """Returns the data set without some of its images and their annotations, counted under `reason`."""
    if not image_ids:
        return dataset
    return replace(
        dataset,
        images=tuple(image for image in dataset.images if image.id not in image_ids),
        annotations={image_id: rows for image_id, rows in dataset.annotations.items() if image_id not in image_ids},
        dropped={**dataset.dropped, reason: dataset.dropped.get(reason, 0) + len(image_ids)},
    )


def counted_reason(count: int, reason: str) -> str:
    """Returns a count with a reason of `CocoDataset.dropped` in words: `1 box without an area`."""
    return counted(count, _ONE[reason], reason)


def check_dropped(dataset: CocoDataset, most: float | None = None) -> None:
    """Raises AnnotationError if more than the share `most` of a data set's instances was left out. None means 0.05."""
    most = MOST_UNUSABLE if most is None else most
    left_out = sum(dataset.dropped.get(reason, 0) for reason in DROPPED_INSTANCES)
    drawn = left_out + dataset.instance_count()
    if left_out > most * drawn:
        reasons = ", ".join(counted_reason(dataset.dropped[r], r) for r in DROPPED_INSTANCES if dataset.dropped.get(r))
        names = "; ".join(name for r in DROPPED_INSTANCES for name in dataset.examples.get(r, ()))
        raise AnnotationError(
            f"{counted_of(left_out, drawn, 'instance')} of {dataset.source} cannot be used: {reasons}. "
            f"{agreeing(left_out, 'It is', 'The first:')} {names}. Fix the file, or allow more than {100 * most:.3g}% of the "
            "instances to be left out with --max-unusable."
        )


def image_folder(given: str | None, annotations: str) -> str:
    """Returns the image folder of the COCO file at `annotations`: `given`, or else `images` beside the file."""
    return canonical(given) if given is not None else Storage.join(parent(annotations), "images")
