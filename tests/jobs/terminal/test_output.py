"""No command overwrites what it reads."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from masklake.jobs import convert, propose, train
from masklake.jobs.terminal.output import check_output
from masklake.model.errors import ConfigError
from masklake.pipeline.errors import AccessDeniedError, InputNotFoundError
from masklake.pipeline.storage import local_files
from masklake.pipeline.storage.storage import Storage

WRITTEN = "which this would overwrite"


def test_an_output_that_is_a_source_is_refused_under_any_of_its_names(tmp_path: Path) -> None:
    truth = tmp_path / "e1.json"
    truth.write_text("{}")
    (tmp_path / "link.json").symlink_to(truth)
    os.link(truth, tmp_path / "hard.json")
    for name in ("e1.json", "x/../e1.json", "link.json", "hard.json"):
        with pytest.raises(ConfigError, match=f"is the truth, {WRITTEN}"):
            check_output(f"{tmp_path}/{name}", sources={"the truth": str(truth), "the config": None})
    check_output(str(tmp_path / "e2.json"), sources={"the truth": str(truth)})


def test_a_file_in_a_folders_place_is_called_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputNotFoundError, match=r"file is a file, not a folder; check the path"):
        check_output(f"{tmp_path}/file/e.json")
    with pytest.raises(InputNotFoundError, match=r"there is no folder .*file2; make it"):
        check_output(f"{tmp_path}/file2/e.json")


def test_objects_are_compared_by_their_canonical_uri() -> None:
    with pytest.raises(ConfigError, match=WRITTEN):
        check_output("s3://b/e.json", sources={"the truth": "s3://b/e.json"})
    check_output("s3://b/e.json", sources={"the truth": "s3://c/e.json"})


def test_convert_does_not_overwrite_the_names_of_its_categories(tmp_path: Path) -> None:
    names = tmp_path / "names.safetensors"
    names.write_text("cat")
    with pytest.raises(ConfigError, match=f"is the file of --categories, {WRITTEN}"):
        convert.run("in.pth", str(names), "tiny", Storage(), categories=str(names))
    assert names.read_text() == "cat"


@pytest.mark.parametrize("read", ["coco", "weights"])
def test_propose_does_not_overwrite_what_it_reads(tmp_path: Path, read: str) -> None:
    output = tmp_path / "a.parquet"
    output.write_text("{}")
    with pytest.raises(ConfigError, match=WRITTEN):
        propose.run(propose.ProposeOptions(**{"coco": "c.json", "weights": "w", "output": str(output), read: str(output)}))
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_propose_writes_into_no_folders_place(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").mkdir()
    with pytest.raises(ConfigError, match=r"it is a folder"):
        propose.run(propose.ProposeOptions(coco="c.json", weights="w", output=str(tmp_path / "p.parquet")))


def test_propose_does_not_overwrite_an_image(tmp_path: Path) -> None:
    coco = tmp_path / "c.json"
    coco.write_text(
        '{"images": [{"id": 1, "file_name": "a.parquet", "width": 4, "height": 4}], "annotations": [], '
        '"categories": [{"id": 1, "name": "cat"}]}'
    )
    (tmp_path / "images").mkdir()
    options = propose.ProposeOptions(coco=str(coco), weights="w", output=str(tmp_path / "images" / "a.parquet"))
    with pytest.raises(ConfigError, match=f"is one of the images, {WRITTEN}"):
        propose.run(options)


@pytest.mark.parametrize("option", ["train", "val", "weights", "proposals"])
def test_training_does_not_read_from_the_folder_that_it_writes(tmp_path: Path, option: str) -> None:
    values = {"train": "t.json", "learn": "detector", option: f"{tmp_path}/runs/n/metrics.json"}
    options = train.TrainOptions(output=f"{tmp_path}/runs/", name="n", **values)
    called = "TRAIN" if option == "train" else f"of --{option}"
    with pytest.raises(ConfigError, match=rf"the file {called} lies in the folder of the run 'n'"):
        train.run(options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["s3://b//", "s3://b/runs//", "s3://b/a//runs", "s3://b/a/../runs"])
def test_training_writes_below_no_key_that_its_clients_would_name_otherwise(output: str) -> None:
    options = train.TrainOptions(train="t.json", output=output, name="n")
    with pytest.raises(ConfigError, match=rf"^--output '{output}': a run cannot be stored under a key with `//`"):
        train.run(options)


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(local_files.tempfile, "TemporaryFile", refused)
    with pytest.raises(AccessDeniedError, match=f"^{tmp_path}/a.csv: permission denied"):
        check_output(str(tmp_path / "a.csv"))
    os.mkfifo(tmp_path / "pipe")
    for written_to in ("/dev/null", str(tmp_path / "pipe")):
        check_output(written_to)
