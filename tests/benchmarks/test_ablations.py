"""The ablation harness: fair pairs, the paper's figures as printed, and trainings that are never repeated."""

from __future__ import annotations

import csv
import math
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

from benchmarks import ablations
from benchmarks.ablation_tables import ARROW, SHAPES, TABLES, Table, Variant
from masklake.jobs.shapes import generate
from masklake.model.config import ModelConfig
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.phases import begin_phase
from masklake.pipeline.training.augmentation import Augmentation
from masklake.pipeline.training.recipe import build_optimizer, recipe_of

TRAININGS = ablations.lines(list(TABLES.values()))


def differing(one: Variant, other: Variant) -> set[str]:
    fields = {name for name in ModelConfig.model_fields if getattr(one.config, name) != getattr(other.config, name)}
    return fields | ({"phases"} if one.phases != other.phases else set())


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.key)
def test_the_models_of_a_table_differ_in_what_it_is_about_and_in_nothing_else(table: Table) -> None:
    pairs = [differing(a, b) for a, b in combinations(table.variants, 2)]
    assert all(pairs), "two lines of a table are the same model"
    assert set.union(*pairs) == table.fields
    assert {len(variant.paper) for variant in table.variants} == {len(table.metrics)}
    assert set(table.metrics) <= set(ablations.METRICS)


def test_the_gains_are_those_that_the_paper_prints() -> None:
    """Under its tables 2b and 2d, and in the text of sections 4.2 and 5."""
    printed = {"2b": (5.5, 7.1, 6.4), "2d": (7.3, 5.3, 10.5, 5.8, 2.6, 9.5), "2e": (2.1,), "6": (4.4,), "agnostic": (0.6,)}
    for key, gains in printed.items():
        first, last = TABLES[key].variants[0].paper, TABLES[key].variants[-1].paper
        found = [after - before for before, after in zip(first, last, strict=True)][: len(gains)]
        assert found == pytest.approx(list(gains))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ablations.Drawn]:
    """Four small pictures, with all shapes and with arrows alone, by the number of categories."""
    annotations = generate(tmp_path_factory.mktemp("shapes"), images=4, size=64, seed=3)
    return {
        len(categories): ablations.Drawn(annotations, categories, Augmentation(flip=True), seed=0)
        for categories in (SHAPES, ARROW)
    }


@pytest.mark.parametrize(("variant", "name"), TRAININGS.values(), ids=[name for _, name in TRAININGS.values()])
def test_every_variant_learns(variant: Variant, name: str, drawn: dict[int, ablations.Drawn]) -> None:
    torch.manual_seed(0)
    model = MaskRCNN(variant.config)
    images, targets = next(drawn[len(variant.config.categories)].batches(0, 2))
    for phase in variant.phases:
        model = begin_phase(model, phase).train()
        recipe = recipe_of(model.config.preset)
        optimizer = build_optimizer(model, recipe, 1e-3)
        totals = []
        for _ in range(4):
            torch.manual_seed(1)  # the same anchors and regions each time
            totals.append(float(ablations.step(model, optimizer, recipe, images, targets)))
        assert totals[-1] < totals[0], (name, phase)
        assert all(math.isfinite(total) for total in totals)


def test_all_variants_of_a_seed_start_from_the_same_weights(drawn: dict[int, ablations.Drawn]) -> None:
    """Whichever of them is the first to ask for them."""
    scale = ablations.Scale(images=4, val_images=0, size=64, rpn_epochs=1, epochs=0)
    starts = [ablations.proposals(v.config, drawn[3], scale, 0, "cpu") for v in TABLES["2b"].variants]
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(weight, starts[1][name]) for name, weight in starts[0].items())
    trained = ablations.train(TABLES["2b"].variants[0], starts[1], drawn[3], scale, 0, "cpu").network.state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in starts[0].items())


def test_all_variants_see_the_same_images_in_the_same_order(drawn: dict[int, ablations.Drawn]) -> None:
    first, again = (list(drawn[3].batches(1, 2)) for _ in range(2))
    assert len(first) == 2
    for (images, targets), (others, truths) in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))
        assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(targets, truths, strict=True))
    assert not all(
        torch.equal(a, b)
        for (images, _), (others, _) in zip(first, drawn[3].batches(2, 2), strict=True)
        for a, b in zip(images, others, strict=True)
    ), "another epoch has another order or other mirrors"


def test_where_arrows_count_the_other_shapes_are_only_in_the_way(drawn: dict[int, ablations.Drawn]) -> None:
    assert [category.name for category in drawn[1].truth.categories] == ["arrow"]
    everything, arrows = ([a for rows in drawn[n].truth.annotations.values() for a in rows] for n in (len(SHAPES), len(ARROW)))
    assert arrows == [a for a in everything if a.category_id == ARROW[0].id]
    assert len(arrows) < len(everything)
    assert len(drawn[1].images) == len(drawn[3].images) == 4


def test_spread_is_over_seeds_and_gains_are_within_a_seed() -> None:
    before = [{"mask AP": 10.0, "box AP": None}, {"mask AP": 30.0, "box AP": 1.0}]
    after = [{"mask AP": 12.0, "box AP": 2.0}, {"mask AP": 34.0, "box AP": 1.0}]
    assert ablations.spread(before, "mask AP") == "20.0 ± 14.1"
    gains = [ablations.gain(a, b) for a, b in zip(before, after, strict=True)]
    assert ablations.spread(gains, "mask AP", sign="+") == "+3.0 ± 1.4"
    assert ablations.spread(gains, "box AP", sign="+") == "+0.0"
    assert ablations.spread(gains, "keypoint AP") == "-"


def test_a_run_is_recorded_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("benchmarks.record", "benchmarks.ablations"):
        monkeypatch.setattr(f"{module}.RESULTS", tmp_path / "results")
    monkeypatch.setattr("benchmarks.record.REPORTS", tmp_path / "reports")
    small = ["--images", "2", "--val-images", "2", "--size", "64", "--rpn-epochs", "1", "--epochs", "1", "--device", "cpu"]

    def run(*arguments: str) -> tuple[list[dict[str, str]], str]:
        monkeypatch.setattr(sys, "argv", ["ablations", *small, *arguments])
        ablations.main()
        rows = csv.DictReader((tmp_path / "results/ablations.csv").read_text().splitlines())
        return list(rows), capsys.readouterr().out

    rows, _ = run("--tables", "2b", "agnostic", "--seeds", "1")
    assert [row["variant"] for row in rows] == [
        "2b: softmax",
        "2b: sigmoid | agnostic: class-specific",
        "agnostic: class-agnostic",
    ]
    rows, printed = run("--tables", "2b", "agnostic", "--seeds", "2")
    assert [row["seed"] for row in rows] == ["0", "0", "0", "1", "1", "1"]
    assert "paper: sigmoid" in printed
    (written,) = (tmp_path / "reports").glob("*-ablations.md")
    assert "| paper: softmax | 24.8 | 44.1 | 25.1 |" in written.read_text()
    again, _ = run("--tables", "2b", "agnostic", "--seeds", "2")
    assert again == rows
