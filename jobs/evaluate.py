"""`masklake evaluate`: evaluates the labels of a table against the ground truth in a COCO file.

Every image of the ground truth counts. An image that has no row in the table, or could not be read, has no detections; the
report says how many there are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from masklake.jobs.fields import EvaluateFields
from masklake.jobs.terminal.counts import counted_instances
from masklake.jobs.terminal.output import check_output
from masklake.model.errors import ConfigError
from masklake.model.wording import agreeing, counted, counted_of, percent
from masklake.pipeline.coco.dataset import CocoDataset, check_dropped, counted_reason
from masklake.pipeline.coco.reading import read_coco
from masklake.pipeline.coco.values import quoted
from masklake.pipeline.errors import InputNotFoundError
from masklake.pipeline.results.coco_results import (
    COLUMNS,
    ImageNames,
    Matches,
    TableDetections,
    check_keypoints,
    check_sizes,
    collect,
)
from masklake.pipeline.results.evaluation import KIND_NAMES, IouType, Score, coco_metrics, mean_iou
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.fields import LIKELY_SCORE
from masklake.pipeline.table.query import query, stream


class EvaluateReport(BaseModel):
    """The results of an evaluation. Scores are 0 to 1; None if the ground truth has nothing of the kind."""

    model_config = ConfigDict(frozen=True)

    table: str
    truth: str
    images: int = Field(description="Images of the ground truth. All of them count.")
    labelled: int = Field(description="Images of the ground truth whose row in the table has the status ok.")
    failed: int = Field(description="Images of the ground truth whose row in the table has another status.")
    failures: dict[str, int] = Field(description="The failed images by status.")
    missing: int = Field(description="Images of the ground truth without a row in the table.")
    strangers: int = Field(description="Images of the table that the ground truth does not list. They are ignored.")
    ambiguous: int = Field(description="Ignored images of the table whose name alone matches several of the ground truth.")
    instances: int = Field(description="Instances of the ground truth, without crowds.")
    detections: int = Field(description="Detections in these images with any score: average precision needs them all.")
    detections_likely: int = Field(description="Detections in these images with score >= 0.5.")
    dropped: dict[str, int] = Field(description="What was left out of the ground truth, by reason.")
    incomplete: dict[str, int] = Field(description="Instances that lack the ground truth of one task, by what they lack.")
    notes: list[str]
    scores: dict[IouType, dict[str, Any]]
    not_scored: dict[IouType, str] = Field(description="Kinds that are not scored, and which side lacks them.")
    mean_iou: float | None = Field(description="Mean IoU of the foreground; None without masks.")
    iou_score: float = Field(description="Minimum score of a detection in mean_iou.")


def run(
    storage: Storage,
    table: str,
    truth: str,
    images: str | None = None,
    labelling_run: str | None = None,
    max_dets: Sequence[int] = EvaluateFields.max_dets,
    iou_score: float = EvaluateFields.iou_score,
    output: str | None = None,
    max_unusable: float | None = None,
) -> EvaluateReport:
    """Evaluates the table's current rows, or those of one labelling run, and writes the report as JSON to `output`.

    images: folder of the ground truth's images; None matches their file names with the ends of the table's URIs. max_dets:
    maximum numbers of detections per image. iou_score: minimum score of a detection in the mean IoU. max_unusable: maximum
    share of the ground truth's instances that may be left out; None: 0.05.

    Raises TableError; AnnotationError for an invalid ground truth, or if more would be left out; InputNotFoundError if the
    table has none of the images; ConfigError for an invalid output, or if the two sides have no category in common.
    """
    if output is not None:
        check_output(output, table, {"the file of --truth": truth})
    data = read_coco(storage, truth)
    check_dropped(data, max_unusable)
    matches, found = _read_table(storage, table, ImageNames(data, images), labelling_run)
    if not found.labelled and not found.failed:
        raise InputNotFoundError(
            f"{table}: {_none_known(found.strangers, len(data.images))} of {truth}. "
            f"Check its names{_example(data)}, or name the folder of its images with --images."
        )
    check_sizes(found, data)
    check_categories(table, data, found)
    check_keypoints(found, data)
    report = _report(table, data, matches, found, coco_metrics(data, found.rows, max_dets=max_dets), iou_score)
    if output is not None:
        storage.write_bytes(output, json.dumps(report.model_dump(mode="json"), indent=1).encode())
    return report


def _read_table(storage: Storage, table: str, names: ImageNames, labelling_run: str | None) -> tuple[Matches, TableDetections]:
    """Returns the matches of the table's rows with images, and their detections. Raises InputNotFoundError for an unknown
    run.
    """
    parameters = None if labelling_run is None else {"run": labelling_run}
    source = "current_images" if labelling_run is None else "images WHERE run = $run"
    sql = f"SELECT {', '.join(COLUMNS)} FROM {source}"  # noqa: S608 - constants of this program; the run is a parameter
    with stream(storage, table, f"SELECT uri FROM {source}", parameters) as batches:  # noqa: S608 - likewise
        matches = names.match(uri for batch in batches for uri in batch["uri"].to_pylist())
    with stream(storage, table, sql, parameters) as batches:
        found = collect(batches, matches.image_ids)
    if labelling_run is not None and not (found.labelled or found.failed or found.strangers):
        runs = ", ".join(
            row["run"] for row in query(storage, table, "SELECT DISTINCT run FROM images ORDER BY run").to_pylist()
        )
        raise InputNotFoundError(f"{table}: has no run {labelling_run!r}; its runs: {runs}")
    return matches, found


def _report(
    table: str,
    data: CocoDataset,
    matches: Matches,
    found: TableDetections,
    scores: Mapping[IouType, Score],
    iou_score: float,
) -> EvaluateReport:
    """Returns the scores with the counts behind them."""
    return EvaluateReport(
        table=table,
        truth=data.source,
        images=len(data.images),
        labelled=found.labelled,
        failed=found.failed,
        failures=dict(found.failures),
        missing=len(data.images) - found.labelled - found.failed,
        strangers=found.strangers,
        ambiguous=len(matches.ambiguous),
        instances=data.instance_count(),
        detections=len(found.rows),
        detections_likely=sum(row["score"] >= LIKELY_SCORE for row in found.rows),
        dropped=dict(data.dropped),
        incomplete=data.incomplete(),
        notes=[
            *_notes({c.id: c.name for c in data.categories}, found.names),
            *_partial(found.rows, scores),
            *_ambiguous(matches.ambiguous),
            *_failures(found),
            *_incomplete(data),
        ],
        scores={kind: vars(score) for kind, score in scores.items()},
        not_scored=not_scored(data, found.rows, scores),
        mean_iou=mean_iou(data, found.rows, iou_score) if "segm" in scores else None,
        iou_score=iou_score,
    )


def _notes(truth: Mapping[int, str], table: Mapping[int, str]) -> list[str]:
    """Returns likely causes of wrong scores: ids that mean something else on the two sides."""
    notes = [
        f"category {number} is '{table[number]}' in the table and '{truth[number]}' in the truth"
        for number in sorted(table.keys() & truth.keys())
        if table[number] != truth[number]
    ]
    if unknown := sorted(table.keys() - truth.keys()):
        names = ", ".join(table[number] for number in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        notes.append(f"the truth has no category of these detections, which do not count: {names}")
    return notes


def check_categories(table: str, truth: CocoDataset, found: TableDetections) -> None:
    """Raises ConfigError if no detection has a category of the ground truth: every score would be 0 and mean nothing."""
    known = {category.id: category.name for category in truth.categories}
    if found.names and not found.names.keys() & known.keys():
        raise ConfigError(
            f"{table} and {truth.source} have no category id in common: {_ids(found.names)} in the table, "
            f"{_ids(known)} in the truth. Give the truth the ids that the model was trained with."
        )


def _none_known(images: int, known: int) -> str:
    """Returns a clause that none of a table's images is in the ground truth; its name follows the clause."""
    none = agreeing(images, "its only image is not", f"none of its {images:,} images is")
    return f"{none} {agreeing(known, 'the only one', f'one of the {known:,}')}"


def _example(truth: CocoDataset) -> str:
    return f", such as {quoted(truth.images[0].file_name)}" if truth.images else ""


def _ids(names: Mapping[int, str]) -> str:
    shown = [f"{number} ({name})" for number, name in sorted(names.items())[:5]]
    return ", ".join([*shown, *(["..."] if len(names) > len(shown) else [])])


def not_scored(truth: CocoDataset, rows: Sequence[Mapping[str, Any]], scored: Collection[IouType]) -> dict[IouType, str]:
    """Returns the kinds that one side has and the other lacks, with the side that lacks them."""
    sides: dict[IouType, tuple[bool, str, str]] = {
        "segm": (truth.has_masks, "masks", "segmentation"),
        "keypoints": (truth.has_keypoints, "keypoints", "keypoints"),
    }
    lacking: dict[IouType, str] = {}
    for kind, (in_truth, name, column) in sides.items():
        in_table = any(column in row for row in rows)
        if in_truth and not in_table and kind not in scored:
            lacking[kind] = f"the table holds no {name}; `masklake label --tasks` says what is stored"
        elif in_table and not in_truth:
            lacking[kind] = f"the truth holds no {name}"
    return lacking


def _partial(rows: Sequence[Mapping[str, Any]], scored: Collection[IouType]) -> list[str]:
    """Returns a note on a table with several runs, some of which stored no masks."""
    without = sum("segmentation" not in row for row in rows) if "segm" in scored else 0
    if not without:
        return []
    hold = agreeing(without, "holds no mask and does not count for masks", "hold no mask and do not count for masks")
    return [f"{counted_of(without, len(rows), 'detection')} {hold}"]


def _ambiguous(uris: Sequence[str]) -> list[str]:
    if not uris:
        return []
    one = f"image of the table, {uris[0]}, fits several of the truth by its name alone and does not count"
    many = f"images of the table, such as {uris[0]}, fit several of the truth by their name alone and do not count"
    return [f"{counted(len(uris), one, many)}; name the folder of the truth's images with --images"]


def _failures(found: TableDetections) -> list[str]:
    """Returns why images of the ground truth have no detections; the scores do not show it."""
    if not found.failed:
        return []
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(found.failures.items()))
    example = agreeing(found.failed, "", "such as ") + str(found.first_failure)
    return [f"images that failed count as images without detections: {counts}; {example}"]


def _incomplete(truth: CocoDataset) -> list[str]:
    return [
        counted(
            count,
            f"instance of the truth {reason} is left out of that task's scores and counts in the others",
            f"instances of the truth {reason} are left out of that task's scores and count in the others",
        )
        for reason, count in truth.incomplete().items()
    ]


def describe(report: EvaluateReport) -> str:
    """Returns the report as text: what was compared, then one line per number, in percent as papers write them."""
    lines = [
        f"{report.table} against {report.truth}",
        f"  {counted(report.images, 'image')} with {counted(report.instances, 'instance')}: {report.labelled:,} labelled, "
        f"{report.failed:,} failed, {report.missing:,} not in the table (these two count as images without detections)",
    ]
    if report.strangers:
        one, many = "image of the table is not in the truth and does not", "images of the table are not in the truth and do not"
        lines.append(f"  {counted(report.strangers, one, many)} count")
    lines += [f"  the truth's reader left out {counted_reason(count, reason)}" for reason, count in report.dropped.items()]
    lines += [f"  note: {note}" for note in report.notes]
    lines.append(
        f"  found in them: {counted_instances(report.detections_likely, report.detections)} (average precision counts all)"
    )
    lines += [f"  {KIND_NAMES[kind]} is not scored: {reason}" for kind, reason in report.not_scored.items()]
    lines += ["", f"  {'':10}{'detections':>11}{'AP':>8}{'AP50':>8}{'AR':>8}"]
    for kind, score in report.scores.items():
        for count, row in score["by_max_dets"].items():
            values = "".join(f"{percent(row[name]):>8}" for name in ("ap", "ap50", "ar"))
            lines.append(f"  {KIND_NAMES[kind]:10}{f'<= {count}':>11}{values}")
    lines += ["", f"  {'':10}{'AP75':>8}{'small':>8}{'medium':>8}{'large':>8}"]
    for kind, score in report.scores.items():
        sizes = (score["ap_by_area"].get(area) for area in ("small", "medium", "large"))
        lines.append(f"  {KIND_NAMES[kind]:10}" + "".join(f"{percent(value):>8}" for value in (score["ap75"], *sizes)))
    if report.mean_iou is not None:
        lines += ["", f"  mean IoU of the foreground, detections of score >= {report.iou_score:g}: {percent(report.mean_iou)}"]
    return "\n".join(lines)
