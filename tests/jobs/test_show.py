"""`masklake show`, run as a user runs it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

from masklake.jobs import show
from masklake.jobs.commands import app
from masklake.model.masks.rle import pack_counts
from masklake.pipeline.errors import InputNotFoundError, TableError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import below
from masklake.pipeline.table.fields import LIKELY_SCORE
from tests.jobs.labelled import jpeg, label


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
