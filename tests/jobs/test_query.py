"""`masklake query` and `masklake show`, run as a user runs them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.main import get_command

from masklake.jobs import show
from masklake.jobs.cli import main
from masklake.jobs.commands import app
from masklake.jobs.query import show as show_answer
from masklake.jobs.terminal.answers import Format, format_of
from masklake.model.errors import ConfigError
from masklake.model.masks.rle import pack_counts
from masklake.pipeline.errors import EmptyInputError, InputNotFoundError, QueryError, TableError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import below
from masklake.pipeline.table.fields import LIKELY_SCORE
from masklake.pipeline.table.schema import FILE_SCHEMA
from masklake.pipeline.table.table import open_table

ORIENTATION = 0x0112


def label(
    folder: str, names: list[str], status: str = "ok", scores: Sequence[float] = (0.9,), rles: Sequence[bytes] = ()
) -> str:
    """A committed table that says each image holds a cat a score in its middle; the images are 60 x 40 pixels, upright."""
    storage = Storage()
    table = open_table(storage, storage.join(folder, "table"))
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        uri = storage.join(folder, name)
        storage.write_bytes(uri, jpeg())
        box = {"x1": 10.0, "y1": 10.0, "x2": 50.0, "y2": 30.0}
        rows.append(
            dict.fromkeys(FILE_SCHEMA.names) | {"image_id": index, "uri": uri, "status": status, "width": 60, "height": 40}
        )
        rows[-1] |= {
            "instances": [{"category_id": 1, "category": "cat", "score": score, "box": box} for score in scores],
            "bytes": len(jpeg()),
            "rles": list(rles),
            "keypoints": [],
        }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=FILE_SCHEMA), sink)
    storage.write_bytes(storage.join(table.run_folder("night-1"), "a.parquet"), sink.getvalue().to_pybytes())
    table.commit_run("night-1")
    return table.uri


def jpeg() -> bytes:
    """Stored lying on its side, 40 x 60, with the EXIF note to turn it: dark on the left once upright."""
    pixels = np.full((40, 60, 3), 200, np.uint8)
    pixels[:, :5] = 10
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    out = io.BytesIO()
    Image.fromarray(pixels).rotate(90, expand=True).save(out, "JPEG", exif=exif, quality=95)
    return out.getvalue()


@pytest.fixture
def masklake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["masklake", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on this machine, then one in a bucket."""
    return str(tmp_path / "a b%") if request.param == "local" else str(request.getfixturevalue("s3").uri("a b%"))


def test_three_ways_to_read_an_answer(place: str, masklake: Any) -> None:
    table = label(place, ["x.jpg", "y ü.jpg"])
    sql = "SELECT uri, category, score, x1, struct_pack(a := area) AS more FROM detections ORDER BY uri"
    code, out, _ = masklake("query", table, sql, "--format", "json")
    assert code == 0
    rows = json.loads(out)
    assert rows[1] == {"uri": f"{place}/y ü.jpg", "category": "cat", "score": 0.9, "x1": 10.0, "more": {"a": None}}
    code, out, _ = masklake("query", table, sql, "--format", "csv")
    assert code == 0
    assert [row["uri"] for row in csv.DictReader(io.StringIO(out))] == [row["uri"] for row in rows]
    code, out, _ = masklake("query", table, sql)
    assert code == 0
    assert out.splitlines()[0].split() == ["uri", "category", "score", "x1", "more"]
    assert out.endswith("(2 rows)\n")


def test_an_answer_can_go_to_a_file(place: str, masklake: Any) -> None:
    table = label(place, ["x.jpg"])
    code, out, _ = masklake("query", table, "SELECT 1 AS one", "--format", "csv", "--output", f"{place}/answer.csv")
    assert (code, out) == (0, f"{place}/answer.csv: 1 row\n")
    assert Storage().read_bytes(f"{place}/answer.csv") == b"one\r\n1\r\n"


def test_no_rows_are_valid_json(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    assert json.loads(masklake("query", table, "SELECT 1 WHERE false", "--format", "json")[1]) == []
    assert masklake("query", table, "SELECT 1 AS one WHERE false")[1].endswith("(0 rows)\n")


def test_errors_have_their_exit_codes(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    assert masklake("query", table, "SELECT nothing")[0] == QueryError.exit_code
    code, out, err = masklake("query", str(tmp_path / "none"), "SELECT 1")
    assert (code, out) == (TableError.exit_code, "")
    assert err.startswith("masklake: error: ")
    assert masklake("query", str(tmp_path / "x.jpg"), "SELECT 1")[0] == TableError.exit_code
    assert EmptyInputError.exit_code != InputNotFoundError.exit_code


def test_columns_of_one_name_stay_apart_in_json(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["a.jpg"])
    _, out, _ = masklake("query", table, "SELECT 1 AS n, 2 AS n, 3 AS n_1", "--format", "json")
    assert json.loads(out) == [{"n": 1, "n_2": 2, "n_1": 3}]


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_dates_that_python_has_not_are_refused_with_the_way_out(tmp_path: Path, form: str) -> None:
    table = label(str(tmp_path), ["a.jpg"])
    with pytest.raises(QueryError, match=r"column 'd'.*select d::VARCHAR"):
        show_answer(Storage(), table, "SELECT DATE '12000-01-01' AS d", Format(form))
    assert show_answer(Storage(), table, "SELECT (DATE '12000-01-01')::VARCHAR AS d", Format(form)) == 1


def test_a_file_holds_every_row_in_full_in_the_format_of_its_suffix(place: str, masklake: Any) -> None:
    table = label(place, ["x.jpg"])
    sql = "SELECT range AS n, repeat('m', 200) AS text FROM range(245)"
    for suffix in ("csv", "csv.gz", "tsv", "json", "jsonl", "parquet", "txt"):
        code, out, _ = masklake("query", table, sql, "-o", f"{place}/all.{suffix}")
        assert (code, out) == (0, f"{place}/all.{suffix}: 245 rows\n")
    lines = Storage().read_bytes(f"{place}/all.csv").decode().splitlines()
    assert (len(lines), lines[245]) == (246, "244," + "m" * 200)
    assert gzip.decompress(Storage().read_bytes(f"{place}/all.csv.gz")).decode().splitlines() == lines
    assert len(json.loads(Storage().read_bytes(f"{place}/all.json"))) == 245
    assert pq.read_table(pa.BufferReader(Storage().read_bytes(f"{place}/all.parquet"))).num_rows == 245
    code, out, _ = masklake("query", table, sql, "-o", f"{place}/other", "--format", "json", "--json")
    assert (code, json.loads(out)) == (0, {"output": f"{place}/other", "format": "json", "rows": 245})


def test_a_pipe_gets_the_whole_table(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    _, out, _ = masklake("query", table, "SELECT range AS n, repeat('m', 200) AS text FROM range(245)")
    assert len(out.splitlines()) == 248
    assert "m" * 200 in out
    assert "…" not in out


def test_sql_comes_from_stdin(tmp_path: Path, masklake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT 1 AS one\n"))
    assert json.loads(masklake("query", table, "-", "--json")[1]) == [{"one": 1}]
    assert masklake("query", table, "SELECT 1", "--json", "--format", "csv")[0] == ConfigError.exit_code
    assert masklake("query", table, "SELECT 1", "--format", "parquet")[0] == ConfigError.exit_code


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        ("{0}/nowhere/a.csv", 20, "there is no folder"),
        ("{0}", 12, "is a folder"),
        ("{0}/new/", 12, "is a folder"),
        ("{0}/table/a.csv", 12, "in the table's own folder"),
        ("{0}/link.csv", 12, "in the table's own folder"),
        ("{0}/a.xlsx", 12, ".parquet"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_query_runs(
    tmp_path: Path, masklake: Any, output: str, code: int, said: str
) -> None:
    (tmp_path / "link.csv").symlink_to("table/a.csv")
    found, out, err = masklake("query", label(str(tmp_path), ["x.jpg"]), "SELECT bad", "-o", output.format(tmp_path))
    assert (found, out) == (code, "")
    assert said in err


@pytest.mark.parametrize("output", ["-", "/dev/stdout"])
def test_an_answer_to_stdout_is_followed_by_no_report(tmp_path: Path, masklake: Any, output: str) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    assert masklake("query", table, "SELECT 1 AS n", "-o", output, "--format", "csv")[:2] == (0, "n\r\n1\r\n")


def test_an_answer_that_fails_leaves_the_file_as_it_was(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    (tmp_path / "a.csv").write_text("before")
    sql = "SELECT CASE WHEN range > 40000 THEN error('late') ELSE range END AS n FROM range(50000)"
    code, out, err = masklake("query", table, sql, "-o", str(tmp_path / "a.csv"))
    assert (code, out) == (QueryError.exit_code, "")
    assert "late" in err
    assert (tmp_path / "a.csv").read_text() == "before"
    assert [path.name for path in tmp_path.glob("*.csv")] == ["a.csv"]


@pytest.mark.slow
def test_who_stops_reading_is_no_error(tmp_path: Path, start: Any) -> None:
    command = start("query", label(str(tmp_path), ["x.jpg"]), "SELECT * FROM range(2000000)", "--format", "csv")
    assert command.process.stdout.readline() == "range\n"
    command.process.stdout.close()
    assert (command.process.stderr.read(), command.process.wait(60)) == ("", 141)


def test_show_draws_the_upright_image(place: str, masklake: Any) -> None:
    table = label(place, ["x.jpg"])
    code, out, _ = masklake("show", table, f"{place}/x.jpg", "-o", f"{place}/x.png")
    assert code == 0
    assert "1 instance of score >= 0.5 in" in out
    picture = Image.open(io.BytesIO(Storage().read_bytes(f"{place}/x.png")))
    assert picture.format == "PNG"
    assert picture.size == (960, 640), "60 x 40 upright, enlarged sixteen times"
    assert max(picture.getpixel((20, 20))) < 60  # type: ignore[arg-type]
    assert min(picture.getpixel((940, 20))) > 150  # type: ignore[arg-type]


def test_show_can_leave_out_weak_instances(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    code, out, _ = masklake("show", table, f"{tmp_path}/x.jpg", "-o", f"{tmp_path}/x.png", "--min-score", "0.95", "--json")
    assert code == 0
    assert json.loads(out)["instances"] == 0


def test_show_draws_the_likely_instances_and_says_what_it_hides(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["x.jpg"], scores=(0.9, 0.5, 0.4999, 0.06))
    _, out, _ = masklake("show", table, "x.jpg", "-o", f"{tmp_path}/x.png")
    assert "2 instances of score >= 0.5" in out
    assert "2 weaker hidden, --min-score 0 draws all" in out
    _, out, _ = masklake("show", table, "x.jpg", "-o", f"{tmp_path}/y.png", "--min-score", "0", "--json")
    report = json.loads(out)
    assert (report["instances"], report["hidden"], report["min_score"], report["changed"]) == (4, 0, 0.0, False)
    assert (tmp_path / "x.png").read_bytes() != (tmp_path / "y.png").read_bytes()


@pytest.mark.parametrize("rle", [b"\xff", b"", b"`" * 11, pack_counts(np.array([5, 2**40]), np.array([2]))[0]])
def test_show_refuses_a_mask_that_is_not_its_images(tmp_path: Path, masklake: Any, rle: bytes) -> None:
    table = label(str(tmp_path), ["x.jpg"], rles=[rle])
    code, out, err = masklake("show", table, "x.jpg", "-o", f"{tmp_path}/x.png")
    assert (code, out) == (30, "")
    assert f"{tmp_path}/x.jpg: instance 0 of its row has a mask whose" in err
    assert not (tmp_path / "x.png").exists()


def test_show_takes_a_unique_ending_of_the_path(place: str, masklake: Any) -> None:
    table = label(place, ["a/x.jpg", "b/x.jpg", "b/ax.jpg", "b/100%_y.jpg"])
    for ending, found in (
        ("a/x.jpg", "a/x.jpg"),
        ("ax.jpg", "b/ax.jpg"),
        ("./b/x.jpg", "b/x.jpg"),
        ("100%_y.jpg", "b/100%_y.jpg"),
    ):
        code, out, err = masklake("show", table, ending, "-o", f"{place}/x.png", "--json")
        assert code == 0, err
        assert json.loads(out)["uri"] == f"{place}/{found}"
    code, out, _ = masklake("show", table, "%_y.jpg", "-o", f"{place}/x.png", "--json")
    assert json.loads(out)["uri"] == f"{place}/b/100%_y.jpg", "a name's own end, where no whole part of a path fits"
    code, _, err = masklake("show", table, "x.jpg", "-o", f"{place}/x.png")
    assert code == InputNotFoundError.exit_code
    assert f"2 images of the table end with it, such as {place}/a/x.jpg, {place}/b/x.jpg; give more of the path" in err


def test_show_finds_images_that_moved(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path / "old"), ["photos/sub/x.jpg", "photos/x.jpg"])
    (tmp_path / "old/photos").rename(tmp_path / "new")
    output = str(tmp_path / "x.png")
    code, _, err = masklake("show", table, "sub/x.jpg", "-o", output)
    assert code == InputNotFoundError.exit_code
    assert "--images" in err
    for name in ("sub/x.jpg", str(tmp_path / "new/sub/x.jpg"), str(tmp_path / "old/photos/sub/x.jpg")):
        code, _, err = masklake("show", table, name, "-o", output, "--images", str(tmp_path / "new"))
        assert (code, err) == (0, "")
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("empty", "holds no file named as the end of"),
        ("none", "there is no such folder"),
        ("x.png", "is a"),
    ):
        code, _, err = masklake("show", table, "sub/x.jpg", "-o", str(tmp_path / "y.png"), "--images", str(tmp_path / folder))
        assert code == InputNotFoundError.exit_code
        assert f"{tmp_path / folder}: {message}" in err


class Listed:
    """A storage that holds these objects."""

    def __init__(self, *uris: str) -> None:
        self.uris = uris

    def is_file(self, uri: str) -> bool:
        return uri in self.uris

    def exists(self, uri: str) -> bool:
        return any(name.startswith(below(uri)) for name in self.uris)


@pytest.mark.parametrize(
    ("labelled", "folder", "there"),
    [
        ("s3://old/x.jpg", "s3://new//", "s3://new//x.jpg"),
        ("s3://old/a/x.jpg", "s3://new/b//", "s3://new/b//a/x.jpg"),
        ("s3://old//x.jpg", "s3://new", "s3://new//x.jpg"),
        ("s3://old//x.jpg", "s3://new/", "s3://new/x.jpg"),
        ("s3://old/a/../x.jpg", "s3://new/b", "s3://new/b/../x.jpg"),
        ("s3://old/a/x.jpg", "s3://new", "s3://new/old/a/x.jpg"),
        ("/old/a/x.jpg", "s3://new/", "s3://new/a/x.jpg"),
        ("s3://old/a/x.jpg", "/new", "/new/a/x.jpg"),
    ],
)
def test_a_moved_image_is_found_by_its_literal_key(labelled: str, folder: str, there: str) -> None:
    assert show._moved(Listed(there, "s3://new/other.jpg"), labelled, folder) == there


def test_a_key_with_a_slash_too_many_is_no_other_image() -> None:
    with pytest.raises(InputNotFoundError, match="holds no file named"):
        show._moved(Listed("s3://new/x.jpg", "s3://new//y.jpg"), "s3://old/x.jpg", "s3://new//")
    with pytest.raises(InputNotFoundError, match="holds no file named"):
        show._moved(Listed("/x.jpg", "/new/y.jpg"), "s3://old/../x.jpg/..", "/new")
    assert show._relative("s3://new//x.jpg", "s3://new//") == "x.jpg"
    assert show._relative("s3://new//x.jpg", "s3://new") == "/x.jpg"


def test_show_overwrites_no_image_of_the_table(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path / "old"), ["photos/a.jpg", "photos/b.jpg"])
    other = tmp_path / "old/photos/b.jpg"
    (tmp_path / "link").symlink_to(tmp_path / "old/photos")
    for output in (str(other), f"{tmp_path}/link/b.jpg"):
        code, _, err = masklake("show", table, "a.jpg", "-o", output)
        assert (code, other.read_bytes()) == (12, jpeg())
        assert f"{output}: is where the table's image {other} lies" in err
    (tmp_path / "old/photos").rename(tmp_path / "new")
    code, _, err = masklake("show", table, "a.jpg", "-o", f"{tmp_path}/new/b.jpg", "--images", f"{tmp_path}/new")
    assert (code, (tmp_path / "new/b.jpg").read_bytes()) == (12, jpeg())
    assert masklake("show", table, "a.jpg", "-o", f"{tmp_path}/new/c.jpg", "--images", f"{tmp_path}/new")[0] == 0


def test_show_finds_a_name_in_either_form_of_unicode(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["caf\u00e9.jpg", "u\u0308ber.jpg"])
    for name, stored in (("cafe\u0301.jpg", "caf\u00e9.jpg"), ("\u00fcber.jpg", "u\u0308ber.jpg")):
        code, out, _ = masklake("show", table, name, "-o", str(tmp_path / "x.png"), "--json")
        assert (code, json.loads(out)["uri"]) == (0, f"{tmp_path}/{stored}")


def test_show_of_a_name_that_is_no_utf8_says_that_the_table_has_it_not(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["a.jpg"])
    code, _, err = masklake("show", table, "\udce9.jpg", "-o", str(tmp_path / "x.png"))
    assert code == InputNotFoundError.exit_code
    assert "is not in the table" in err


def test_sql_that_begins_with_a_comment_is_told_from_an_option(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["a.jpg"])
    code, _, err = masklake("query", table, "-- x")
    assert (code, "SQL is one argument" in err) == (2, True)
    code, _, err = masklake("query", table, "--formt")
    assert (code, "SQL is one argument" in err) == (2, False)


def test_show_notes_that_the_file_changed(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    Image.new("RGB", (60, 40)).save(tmp_path / "x.jpg")
    code, out, _ = masklake("show", table, "x.jpg", "-o", str(tmp_path / "x.png"))
    assert code == 0
    assert "has changed since it was labelled" in out


@pytest.mark.parametrize(("name", "form"), [("x.jpg", "JPEG"), ("x.WEBP", "WEBP"), ("x.png", "PNG")])
def test_show_writes_what_the_suffix_says(tmp_path: Path, masklake: Any, name: str, form: str) -> None:
    table = label(str(tmp_path / "in"), ["x.jpg"])
    assert masklake("show", table, "x.jpg", "-o", str(tmp_path / name))[0] == 0
    assert Image.open(tmp_path / name).format == form


@pytest.mark.parametrize(
    ("output", "code"),
    [("{0}/x.gif", 12), ("{0}/none/x.png", 20), ("{0}/in", 12), ("{0}/in/x.jpg", 12), ("{0}/in/table/x.png", 12)],
)
def test_show_refuses_an_output_that_cannot_be(tmp_path: Path, masklake: Any, output: str, code: int) -> None:
    table = label(str(tmp_path / "in"), ["x.jpg"])
    assert masklake("show", table, "x.jpg", "-o", output.format(tmp_path))[0] == code
    assert (tmp_path / "in/x.jpg").read_bytes() == jpeg()


def test_the_scores_default_is_that_of_summaries() -> None:
    defaults = {parameter.name: parameter.default for parameter in get_command(app).commands["show"].params}  # type: ignore[attr-defined]
    assert defaults["min_score"] == LIKELY_SCORE


def test_show_names_what_is_near(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["street-001.jpg", "street-002.jpg", "zebra.jpg", "a/b.jpg"])
    code, _, err = masklake("show", table, "street-01.jpg", "-o", str(tmp_path / "x.png"))
    assert code == InputNotFoundError.exit_code
    assert "street-001.jpg" in err
    assert err.index("street-001.jpg") < err.index("street-002.jpg")


def test_show_says_why_there_is_nothing_to_draw(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path / "bad"), ["x.jpg"], status="decode_error")
    code, _, err = masklake("show", table, f"{tmp_path}/bad/x.jpg", "-o", str(tmp_path / "x.png"))
    assert code == InputNotFoundError.exit_code
    assert "decode_error" in err
    table = label(str(tmp_path / "gone"), ["x.jpg"])
    Path(tmp_path / "gone/x.jpg").unlink()
    assert masklake("show", table, f"{tmp_path}/gone/x.jpg", "-o", str(tmp_path / "x.png"))[0] == InputNotFoundError.exit_code


def test_show_says_that_a_tables_file_is_gone(tmp_path: Path) -> None:
    table = label(str(tmp_path), ["a.jpg"])
    for path in Path(table).rglob("*.parquet"):
        path.write_bytes(b"not Parquet")
    with pytest.raises(TableError, match="the table cannot be read"):
        show.run(Storage(), table, "a.jpg", str(tmp_path / "x.png"))


def test_show_refuses_an_image_that_changed_its_size(tmp_path: Path, masklake: Any) -> None:
    table = label(str(tmp_path), ["x.jpg"])
    Image.new("RGB", (10, 10)).save(tmp_path / "x.jpg")
    code, _, err = masklake("show", table, f"{tmp_path}/x.jpg", "-o", str(tmp_path / "x.png"))
    assert code == 24
    assert "label it again" in err


@pytest.mark.parametrize("tasks", ["boxes", "", "box,"])
def test_a_task_that_is_none_is_told_with_its_option(masklake: Any, tasks: str) -> None:
    for arguments in (("label", "x", "T", "--weights", "w"), ("train", "t.json", "-o", "o", "--name", "n")):
        code, _, err = masklake(*arguments, "--tasks", tasks)
        assert code == 12
        assert f"--tasks {tasks!r}: " in err
        assert "give box, mask, keypoint" in err


@pytest.mark.parametrize(("name", "form"), [(".csv", Format.CSV), ("q/.JSON.gz", Format.JSON), ("a.b.parquet", Format.PARQUET)])
def test_a_name_that_is_only_a_suffix_says_its_format(name: str, form: Format) -> None:
    assert format_of(name, None) == form
