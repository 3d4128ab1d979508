"""Summaries name the likely instances first, and then the number of all stored ones."""

from __future__ import annotations

from masklake.jobs.label import LabelReport, describe
from masklake.jobs.labelling.plan import lost_line
from masklake.jobs.terminal.counts import counted_instances


def test_a_report_says_both_counts() -> None:
    report = LabelReport(
        table="table",
        run_id="night-1",
        model_id="tiny-0",
        label_id="a",
        images=500,
        resumed=False,
        statuses={"ok": 500, "missing": 0},
        instances=3109,
        instances_stored=9348,
        categories={"disk": 2000, "arrow": 1109},
        categories_stored={"disk": 5000, "arrow": 4348},
        failed_share=0,
        labelled_now=500,
        seconds=10,
        images_per_s=50,
    )
    lines = describe(report).splitlines()
    assert lines[2:4] == [
        "found      3,109 instances of score >= 0.5, 9,348 stored",
        "categories 2,000 disk, 1,109 arrow (of score >= 0.5)",
    ]
    assert counted_instances(0, 7) == "0 instances of score >= 0.5, 7 stored"
    assert counted_instances(1, 1) == "1 instance of score >= 0.5, 1 stored"


def test_lost_images_read_as_sentences() -> None:
    assert lost_line(1200, 8) == "1,200 images were lost with their workers; they run again, 8 at a time"
    assert lost_line(1, 8) == "1 image was lost with its worker; it runs again"
    assert lost_line(1, 1) == "1 image was lost with its worker; it runs again, alone"
