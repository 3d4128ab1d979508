"""`masklake demo`: every step on generated images, in minutes, with the same code as on a cluster with object storage.

Draws images, trains `tiny` on two Ray Train workers, labels unseen images into a table, evaluates the labels against the ground
truth, runs three queries and draws a contact sheet. Each step continues where an interrupted demo stopped.
"""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from masklake.jobs import evaluate, label, train
from masklake.jobs.fields import SHEET_IMAGES
from masklake.jobs.shapes import CATEGORIES, generate
from masklake.jobs.terminal.answers import write_shown_table
from masklake.jobs.training.options import TrainOptions
from masklake.model.wording import counted
from masklake.pipeline.images.decode import decode
from masklake.pipeline.results.drawing import contact_sheet, draw_instances
from masklake.pipeline.results.evaluation import IouType
from masklake.pipeline.storage.errors import translated
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.fields import LIKELY_SCORE
from masklake.pipeline.table.query import query, stream

Say = Callable[[str], None]

SIZE = 128
"""Pixels of the longer side of an image."""
TRAIN_SEED, VAL_SEED, UNSEEN_SEED = 1, 2, 3

QUESTIONS = (
    (
        "How many shapes of each kind are there?",
        "SELECT category, count(*) AS instances, round(avg(area)) AS mean_pixels\n"
        "FROM current_detections WHERE score >= 0.5 GROUP BY category ORDER BY instances DESC",
    ),
    (
        "Which images are the most crowded?",
        "SELECT parse_filename(uri) AS image, count(*) AS shapes, round(sum(area) / any_value(width * height), 2) AS covered\n"
        "FROM current_detections WHERE score >= 0.5 GROUP BY uri ORDER BY shapes DESC, image LIMIT 5",
    ),
    (
        "Which way do the arrows point? (keypoint 1 is the tip, 4 the tail)",
        "SELECT CASE WHEN keypoints[1].x > keypoints[4].x THEN 'right' ELSE 'left' END AS direction, count(*) AS arrows\n"
        "FROM current_detections WHERE category = 'arrow' AND score >= 0.5 GROUP BY direction ORDER BY direction",
    ),
)


class DemoReport(BaseModel):
    """What the demo created and measured. scores: COCO metrics on the unseen images, 0 to 1."""

    model_config = ConfigDict(frozen=True)

    images_labelled: int
    instances: int = Field(description="Found with score >= 0.5.")
    instances_stored: int = Field(description="All instances in the table.")
    images_per_s: float
    scores: dict[IouType, dict[str, Any]]
    seconds: float
    outputs: dict[str, str]


@dataclass(frozen=True)
class Places:
    """The folders and files of the demo."""

    root: Path

    @property
    def training(self) -> Path:
        """Folder of the runs of `masklake train`."""
        return self.root / "training"

    @property
    def table(self) -> Path:
        """The table of labels."""
        return self.root / "table"

    @property
    def scores(self) -> Path:
        """The report of `masklake evaluate`."""
        return self.root / "scores.json"

    @property
    def sheet(self) -> Path:
        """The contact sheet."""
        return self.root / "contact-sheet.png"

    def images(self, name: str) -> Path:
        """Returns the folder of a generated data set, which holds images/ and instances.json."""
        return self.root / "shapes" / name


def run(output: str, train_images: int, unseen_images: int, epochs: int, say: Say) -> DemoReport:
    """Runs the six steps. Raises the errors of `train`, `label` and `evaluate`."""
    started = time.perf_counter()
    # Each step prints its own lines; the logs of libraries would only distract.
    logging.getLogger("ray").setLevel(logging.ERROR)
    places = Places(Path(output).resolve())
    storage = Storage()
    with translated(str(places.root)):
        places.root.mkdir(parents=True, exist_ok=True)
    say(f"[1/6] Drawing {train_images:,} images of shapes to train on and {unseen_images:,} others to label")
    learning = generate(places.images("train"), train_images, SIZE, TRAIN_SEED)
    checking = generate(places.images("val"), max(20, train_images // 20), SIZE, VAL_SEED)
    unseen = generate(places.images("unseen"), unseen_images, SIZE, UNSEEN_SEED)

    options = train_options(places, learning, checking, epochs)
    workers = counted(options.workers, "Ray Train worker")
    say(f"[2/6] Training the model `{options.preset}` from random weights with {workers}, {counted(epochs, 'epoch')}")
    trained = train.run(options)

    say(f"[3/6] Labelling the {unseen_images:,} unseen images through Ray Data into a Parquet table")
    inputs = {"uri": str(unseen.parent / "images")}
    labelled = label.run(label.options(input=inputs, table=str(places.table), weights=trained.checkpoint), say=say)
    say(label.describe(labelled))

    say("[4/6] Evaluating the labels against the ground truth: COCO's average precision (AP)")
    scored = evaluate.run(storage, str(places.table), str(unseen), output=str(places.scores))
    say(evaluate.describe(scored))

    say("[5/6] Asking the table three questions in SQL")
    for question, sql in QUESTIONS:
        say(f"\n{question}\n{indented(sql)}\n{indented(answer(storage, places.table, sql))}")

    say(f"\n[6/6] Drawing a contact sheet of labelled images, instances of score >= {LIKELY_SCORE:g}")
    draw_sheet(storage, places)

    outputs = {
        "contact sheet": str(places.sheet),
        "table": str(places.table),
        "scores": str(places.scores),
        "checkpoint": trained.checkpoint,
        "training curves": trained.curves,
        "images": str(places.root / "shapes"),
    }
    say("\nDone. Look at:")
    for name, place in outputs.items():
        say(f"  {name:16} {place}")
    say(f"Ask more:  masklake query {places.table} 'FROM current_detections WHERE score >= 0.5 LIMIT 5'")
    return DemoReport(
        images_labelled=labelled.images,
        instances=labelled.instances,
        instances_stored=labelled.instances_stored,
        images_per_s=labelled.images_per_s,
        scores=scored.scores,
        seconds=round(time.perf_counter() - started, 1),
        outputs=outputs,
    )


def train_options(places: Places, learning: Path, checking: Path, epochs: int) -> TrainOptions:
    """Returns the options of the demo's training run."""
    return TrainOptions(
        train=str(learning),
        val=str(checking),
        output=str(places.training),
        name="shapes",
        preset="tiny",
        workers=2,
        recipe={"epochs": epochs, "batch_size": 2},
    )


def answer(storage: Storage, table: Path, sql: str) -> str:
    """Returns the result of `sql` as a text table."""
    text = io.StringIO()
    with stream(storage, str(table), sql) as batches:
        write_shown_table(batches, text)
    return text.getvalue().rstrip()


def indented(text: str) -> str:
    """Returns the lines, indented by two spaces."""
    return "\n".join(f"  {line}" for line in text.splitlines())


def draw_sheet(storage: Storage, places: Places) -> None:
    """Draws SHEET_IMAGES labelled images with masks, boxes and keypoints, as one PNG."""
    sql = "SELECT uri FROM current_images WHERE status = 'ok' ORDER BY uri LIMIT $count"
    images = query(storage, str(places.table), sql, {"count": SHEET_IMAGES})
    uris = images.column("uri").to_pylist()
    rows = query(
        storage,
        str(places.table),
        "SELECT * FROM current_detections WHERE score >= $score AND list_contains($uris, uri)",
        {"score": LIKELY_SCORE, "uris": uris},
    ).to_pylist()
    skeletons = {
        category["name"]: [(start - 1, end - 1) for start, end in category["skeleton"]]
        for category in CATEGORIES
        if "skeleton" in category
    }
    pictures = []
    for uri in uris:
        image = decode(storage.read_bytes(uri)).image
        if image is not None:
            pixels = image.permute(1, 2, 0).contiguous().numpy()
            pictures.append(draw_instances(pixels, [row for row in rows if row["uri"] == uri], skeletons))
    columns = math.ceil(math.sqrt(len(pictures)))
    contact_sheet(pictures, [Path(uri).name for uri in uris], columns=columns).save(places.sheet)
