"""COCO's forms of a mask."""

from __future__ import annotations

import numpy as np
import pycocotools.mask

from masklake.pipeline.coco.document import to_rle

SQUARE = [2.0, 1.0, 8.0, 1.0, 8.0, 5.0, 2.0, 5.0]


def test_polygons_are_drawn_as_pycocotools_draws_them() -> None:
    rles = pycocotools.mask.frPyObjects([SQUARE, [9, 5, 12, 5, 12, 8]], 8, 12)
    expected = pycocotools.mask.decode(pycocotools.mask.merge(rles))
    np.testing.assert_array_equal(pycocotools.mask.decode(to_rle([SQUARE, [9, 5, 12, 5, 12, 8]], 8, 12)), expected)
