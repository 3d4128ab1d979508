"""The paper's ablations, trained again on drawn shapes: our table under the paper's, mean and spread over seeds.

    python -m benchmarks.ablations [--tables 2b 2c] [--seeds 3] [--images 600] [--epochs 8] [--device auto]

Every variant of a table (`benchmarks.ablation_tables`) learns from the same images in the same order, with the same mirrors,
from the same backbone and the same proposals, and is scored on the same unseen images; another seed is another of all but the
last. The proposals are learnt beforehand, as the paper's are for its ablations (section 3.1).
A row of results/ablations.csv is one training. Those that the file already holds from the same code, settings and device are
not repeated, so a run that was stopped goes on. Tables share trainings, as the paper's do.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.ablation_tables import METRICS, PROPOSALS, SHAPES, TABLES, Table, Variant
from benchmarks.record import RESULTS, environment, record, report, table
from masklake.jobs.shapes import generate
from masklake.model.config import Category, ModelConfig
from masklake.model.instances import Target
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.phases import Phase, begin_phase
from masklake.pipeline.coco.dataset import CocoDataset
from masklake.pipeline.coco.reading import read_coco
from masklake.pipeline.results.evaluation import KIND_NAMES, coco_metrics, result_rows
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.training.augmentation import Augmentation, SampleSpec
from masklake.pipeline.training.loader import Loader, training_rows
from masklake.pipeline.training.recipe import Recipe, build_optimizer, clip, peak_rate, rate_factor, recipe_of, set_rate
from masklake.pipeline.training.samples import to_training

NAME = "ablations"
VALIDATION_SEED = 1_000_000
"""Of the unseen images; training images are drawn with the seeds 0, 1, ..."""
KINDS = {"box": "bbox", "mask": "segm", "keypoint": "keypoints"}
CODE = ("model/**/*.py", "pipeline/*.py", "jobs/shapes.py", "benchmarks/ablation*.py")
"""What a result depends on."""


@dataclass(frozen=True)
class Scale:
    """How large a training is. size: pixels of an image's longer side. epochs: of the detector; rpn_epochs: of proposals."""

    images: int
    val_images: int
    size: int
    rpn_epochs: int
    epochs: int


# -- data --------------------------------------------------------------------------------------------------------------


class Drawn:
    """Drawn images, of which the shapes of `categories` are annotated; the others are only in the way."""

    def __init__(self, annotations: Path, categories: tuple[Category, ...], augmentation: Augmentation, seed: int) -> None:
        self.truth = only(read_coco(Storage(), str(annotations)), categories)
        keypoints = max(len(category.keypoints) for category in SHAPES)
        self.spec = SampleSpec(categories, masks=True, keypoints=keypoints, augmentation=augmentation, seed=seed)
        rows = training_rows(self.truth, str(annotations.parent / "images"), self.spec, keep_empty=True)
        self._loader = Loader(rows, self.spec, Storage())
        self._epochs: dict[int, pa.Table] = {}

    def epoch(self, number: int) -> pa.Table:
        """All images in that epoch's order; kept, because every variant learns from them."""
        if number not in self._epochs:
            order = np.random.default_rng((self.spec.seed, number)).permutation(len(self.truth.images))
            self._epochs[number] = self._loader.load(order.tolist(), [number] * len(order))
        return self._epochs[number]

    def batches(self, number: int, size: int) -> Iterator[tuple[list[torch.Tensor], list[Target]]]:
        """Whole batches of that epoch."""
        rows = self.epoch(number)
        for start in range(0, rows.num_rows - size + 1, size):
            yield to_training(rows.slice(start, size), self.spec)

    @cached_property
    def images(self) -> list[torch.Tensor]:
        """As they are, in the order of `truth`."""
        count = len(self.truth.images)
        return to_training(self._loader.load(range(count), [0] * count), self.spec)[0]


def only(dataset: CocoDataset, categories: tuple[Category, ...]) -> CocoDataset:
    """The annotations of these categories alone."""
    ids = {category.id for category in categories}
    kept = {image: tuple(a for a in rows if a.category_id in ids) for image, rows in dataset.annotations.items()}
    return replace(dataset, categories=categories, annotations=kept)


class Shelf:
    """Draws each set of images when it is first asked for, below `folder`."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.folder, self.scale = folder, scale
        self._sets: dict[tuple[int, tuple[Category, ...]], Drawn] = {}

    def learning(self, seed: int, categories: tuple[Category, ...]) -> Drawn:
        """What a training with this seed learns from, half of it mirrored anew each epoch."""
        return self._get(seed, self.scale.images, categories, Augmentation(flip=True))

    def unseen(self, categories: tuple[Category, ...]) -> Drawn:
        """What everything is scored on."""
        return self._get(VALIDATION_SEED, self.scale.val_images, categories, Augmentation(flip=False))

    def _get(self, seed: int, count: int, categories: tuple[Category, ...], augmentation: Augmentation) -> Drawn:
        if (seed, categories) not in self._sets:
            annotations = self.folder / str(seed) / "instances.json"
            if not annotations.exists():
                generate(annotations.parent, count, self.scale.size, seed)
            self._sets[seed, categories] = Drawn(annotations, categories, augmentation, seed)
        return self._sets[seed, categories]


# -- one training ------------------------------------------------------------------------------------------------------


def proposals(config: ModelConfig, learning: Drawn, scale: Scale, seed: int, device: str) -> dict[str, torch.Tensor]:
    """Weights of the backbone and of the RPN, learnt without anything behind them: the same for all variants of a seed."""
    torch.manual_seed(seed)
    model = learn(MaskRCNN(config).to(device), PROPOSALS, learning, scale, seed)
    return {name: weight for name, weight in model.network.state_dict().items() if name.startswith(("backbone.", "rpn."))}


def train(
    variant: Variant, start: Mapping[str, torch.Tensor], learning: Drawn, scale: Scale, seed: int, device: str
) -> MaskRCNN:
    """The variant after its phases, from the weights of `proposals`."""
    torch.manual_seed(seed)
    model = MaskRCNN(variant.config).to(device)
    model.network.load_state_dict(start, strict=False)
    for phase in variant.phases:
        model = learn(model, phase, learning, scale, seed)
    return model.eval()


def learn(model: MaskRCNN, phase: Phase, learning: Drawn, scale: Scale, seed: int) -> MaskRCNN:
    """The model after one phase, with its preset's recipe."""
    torch.manual_seed(seed)
    random.seed(seed)
    model = begin_phase(model, phase).train()
    epochs = scale.rpn_epochs if phase.trains == "rpn" else scale.epochs
    recipe = recipe_of(model.config.preset).model_copy(update={"epochs": epochs})
    optimizer = build_optimizer(model, recipe, 0.0)
    steps = len(learning.truth.images) // recipe.batch_size
    for epoch in range(epochs):
        for number, batch in enumerate(learning.batches(epoch, recipe.batch_size)):
            rate = peak_rate(recipe, recipe.batch_size) * rate_factor(recipe, epoch * steps + number, epochs * steps)
            set_rate(optimizer, rate)
            step(model, optimizer, recipe, *batch)
    return model


def step(
    model: MaskRCNN,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    images: Sequence[torch.Tensor],
    targets: Sequence[Target],
) -> torch.Tensor:
    """Forward, backward, one update; the loss before it, a scalar."""
    total = torch.stack(list(model(images, targets).values())).sum()
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    clip(model.parameters(), recipe)
    optimizer.step()
    return total.detach()


def score(model: MaskRCNN, unseen: Drawn) -> dict[str, float]:
    """COCO's AP, AP50 and AP75 of each of the model's tasks, in percent, by the names of METRICS."""
    categories = {category.id: category for category in model.config.categories}
    answers = model.predict(unseen.images)
    rows = [
        row
        for image, found in zip(unseen.truth.images, answers, strict=True)
        for row in result_rows(image.id, found, categories)
    ]
    kinds = [KINDS[task] for task in KINDS if task in model.config.tasks]
    scores = coco_metrics(unseen.truth, rows, kinds)
    return {
        f"{KIND_NAMES[kind]} {name}": 100 * value
        for kind, found in scores.items()
        for name, value in (("AP", found.ap), ("AP50", found.ap50), ("AP75", found.ap75))
        if value is not None
    }


# -- all trainings -----------------------------------------------------------------------------------------------------

Results = dict[tuple[str, int], dict[str, float]]
"""Scores by what was trained (`digest`) and the seed."""


def digest(variant: Variant) -> str:
    """Returns a name of what is trained, for the CSV: of a configuration and its phases."""
    phases = repr(variant.phases).replace("trains=", "learn=")  # as rows of earlier versions have it
    return hashlib.sha256(f"{variant.config.model_dump_json()} {phases}".encode()).hexdigest()[:12]


def code_version() -> str:
    """Names the sources that a result depends on, as they are on the disk."""
    root = Path(__file__).resolve().parents[1]
    files = sorted({path for pattern in CODE for path in root.glob(pattern)})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def lines(tables: Sequence[Table]) -> dict[str, tuple[Variant, str]]:
    """What is to be trained, each once, with its names in all of these tables; by digest."""
    named: dict[str, tuple[Variant, str]] = {}
    for entry in tables:
        for variant in entry.variants:
            known = named.get(digest(variant))
            name = f"{entry.key}: {variant.name}"
            named[digest(variant)] = (variant, f"{known[1]} | {name}" if known else name)
    return named


def run(tables: Sequence[Table], seeds: int, scale: Scale, device: str) -> Results:
    """Trains what the CSV does not hold yet, all variants of a seed before the next seed, and records each."""
    settings = {"device": environment()["device"], "code": code_version(), **asdict(scale)}
    results = recorded(settings)
    todo = [(seed, key, *entry) for seed in range(seeds) for key, entry in lines(tables).items() if (key, seed) not in results]
    with tempfile.TemporaryDirectory(prefix="masklake-ablations-") as folder:
        trainings = Trainings(Shelf(Path(folder), scale), scale, device)
        for number, (seed, key, variant, name) in enumerate(todo, start=1):
            started = time.perf_counter()
            found = results[key, seed] = trainings.result(variant, seed)
            seconds = f"{time.perf_counter() - started:.0f}"
            shown = {metric: f"{found[metric]:.2f}" if metric in found else "" for metric in METRICS}
            about = {"variant": name, "config": key, "seed": seed, **asdict(scale), "code": settings["code"]}
            record(NAME, {**about, "seconds": seconds, **shown})
            best = ", ".join(f"{metric} {value:.1f}" for metric, value in found.items() if metric.endswith("AP"))
            print(f"{number}/{len(todo)} seed {seed}, {name}: {best} ({seconds} s)", flush=True)
    return results


@dataclass(frozen=True)
class Trainings:
    """Trains and scores variants; what variants of a seed have in common is learnt when it is first asked for."""

    shelf: Shelf
    scale: Scale
    device: str
    starts: dict[tuple[int, str, tuple[Category, ...]], dict[str, torch.Tensor]] = field(default_factory=dict)

    def result(self, variant: Variant, seed: int) -> dict[str, float]:
        """Scores of one training."""
        config = variant.config
        learning, common = self.shelf.learning(seed, config.categories), (seed, config.features, config.categories)
        if common not in self.starts:
            self.starts[common] = proposals(config, learning, self.scale, seed, self.device)
        model = train(variant, self.starts[common], learning, self.scale, seed, self.device)
        return score(model, self.shelf.unseen(config.categories))


def recorded(settings: Mapping[str, object]) -> Results:
    """What the CSV holds of these settings."""
    path = RESULTS / f"{NAME}.csv"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    return {
        (row["config"], int(row["seed"])): {metric: float(row[metric]) for metric in METRICS if row[metric]}
        for row in rows
        if all(row[name] == str(value) for name, value in settings.items())
    }


# -- our table under the paper's ---------------------------------------------------------------------------------------


def under_the_papers(entry: Table, results: Results, seeds: int) -> str:
    """A section in Markdown: the paper's lines, ours below them, and what the last line of each gains over the first.

    Our gains are differences within a seed, so that their spread is without what the two trainings have in common.
    """
    first, last = entry.variants[0], entry.variants[-1]
    ours = {v.name: [results[digest(v), seed] for seed in range(seeds)] for v in entry.variants}
    paper = {v.name: [dict(zip(entry.metrics, v.paper, strict=True))] for v in entry.variants}
    rows = [
        {"": f"{whose}: {v.name}", **{m: spread(found[v.name], m) for m in entry.metrics}}
        for whose, found in (("paper", paper), ("ours", ours))
        for v in entry.variants
    ]
    for whose, found in (("paper", paper), ("ours", ours)):
        gains = [gain(before, after) for before, after in zip(found[first.name], found[last.name], strict=True)]
        name = f"{whose}: {last.name} over {first.name}"
        rows.append({"": name, **{m: spread(gains, m, sign="+") for m in entry.metrics}})
    head = f"## {entry.title}\n\n{entry.source}.{' ' + entry.remark if entry.remark else ''}"
    return f"{head}\n\n{table(rows)}\n"


def gain(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> dict[str, float]:
    """Differences of what both have."""
    return {name: value - old for name, value in after.items() if value is not None and (old := before.get(name)) is not None}


def spread(found: Sequence[Mapping[str, float | None]], metric: str, sign: str = "") -> str:
    """Mean and, of several, sample standard deviation; "-" where nothing was measured."""
    values = [value for one in found if (value := one.get(metric)) is not None]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


NOTES = """\
Scores are in percent, mean ± standard deviation over the seeds; `over` lines are differences within a seed. The paper trains
ResNets on COCO from ImageNet's weights; here narrow networks learn from drawn shapes, proposals and backbone first, from random
weights. So only the direction of a difference can be compared, and only where it exceeds its spread.
"""


def write_report(tables: Sequence[Table], results: Results, seeds: int, scale: Scale) -> Path:
    """The dated report of these tables."""
    ran = {"seeds": seeds, **asdict(scale), "trainings": seeds * len(lines(tables)), "code": code_version()}
    sections = "\n".join(under_the_papers(entry, results, seeds) for entry in tables)
    return report(NAME, "The paper's ablations on drawn shapes", [ran], f"{NOTES}\n{sections}")


def main() -> None:
    """Train what is missing, print, record and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each variant")
    parser.add_argument("--images", type=int, default=600, help="to learn from, drawn anew for each seed")
    parser.add_argument("--val-images", type=int, default=200, help="to score on, the same for all")
    parser.add_argument("--size", type=int, default=96, help="pixels of an image's longer side")
    parser.add_argument("--rpn-epochs", type=int, default=6, help="of proposals and backbone, once for all variants of a seed")
    parser.add_argument("--epochs", type=int, default=8, help="of each variant")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = parser.parse_args()
    available = "cuda" if torch.cuda.is_available() else "cpu"
    tables = [TABLES[key] for key in given.tables]
    scale = Scale(given.images, given.val_images, given.size, given.rpn_epochs, given.epochs)
    results = run(tables, given.seeds, scale, available if given.device == "auto" else given.device)
    for entry in tables:
        print(f"\n{under_the_papers(entry, results, given.seeds)}")
    print(f"report: {write_report(tables, results, given.seeds, scale).name}")


if __name__ == "__main__":
    main()
