"""What a large image with hundreds of masks costs in memory, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEP = """
import resource
import numpy as np
import torch
from masklake.model import create_model
from masklake.model.config import Category
from masklake.pipeline.training.augmentation import Augmentation, SampleSpec, make_sample
from masklake.pipeline.training.samples import sample_rows, to_training

side, count = 3000, 250
random = np.random.default_rng(0)
turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
rows = []
for _ in range(count):
    w, h = (int(v) for v in random.integers(60, 700, 2))
    x, y = int(random.integers(side - w)), int(random.integers(side - h))
    outline = np.stack([x + w / 2 * (1 + np.cos(turn)), y + h / 2 * (1 + np.sin(turn))], 1).ravel().tolist()
    rows.append({"category_id": 1, "bbox": [x, y, w, h], "segmentation": [outline], "keypoints": []})
cell = Category(id=1, name="cell")
spec = SampleSpec((cell,), masks=True, keypoints=0, augmentation=Augmentation(flip=False), seed=0)
image = torch.zeros(3, side, side, dtype=torch.uint8)
images, targets = to_training(sample_rows([(0, make_sample(image, rows, spec, (0, 0, 0)))]), spec)
losses = create_model("tiny", categories=[cell]).train()(images, targets)
sum(losses.values()).backward()
assert len(targets[0].labels) == count
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_step_on_250_masks_of_3000_x_3000_pixels_stays_below_two_gigabytes() -> None:
    """Loading and training together, in one process. Unpacked, as before, they took 7.3 GB."""
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) * 1024 < 2e9
