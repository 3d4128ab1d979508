"""What an input names: folders, patterns, lists and single images, on local folders and S3 alike."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from masklake.model.errors import ConfigError
from masklake.pipeline.errors import InputNotFoundError
from masklake.pipeline.images.decode import FORMATS
from masklake.pipeline.inputs.listing import InputSpec, glob_regex, list_inputs, nothing_found
from masklake.pipeline.inputs.suffixes import IMAGE_SUFFIXES, OTHER_SUFFIXES, UNREAD_SUFFIXES
from masklake.pipeline.storage.left_out import LeftOut
from masklake.pipeline.storage.storage import Storage
from tests.pipeline.inputs.files import IMAGES, NAMES, fill


def listed(storage: Storage, uri: str, column: str | None = None) -> list[dict[str, Any]]:
    return [row for batch in list_inputs(storage, InputSpec(uri=uri, column=column)) for row in batch.to_pylist()]


def uris(rows: list[dict[str, Any]], place: str) -> list[str]:
    return [row["uri"].removeprefix(place + "/") for row in rows]


def test_a_folder_gives_its_images(place: str) -> None:
    storage = fill(place)
    rows = listed(storage, place)
    assert sorted(uris(rows, place)) == sorted(IMAGES)
    assert all(row["etag"] and row["bytes"] for row in rows)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jpg", ["a b.jpg"]),
        ("**/*.jp*g", ["a b.jpg", "sub/deep/g.jpeg"]),
        ("sub/*", ["sub/ü.webp"]),
        ("?+[a-d].JPG", ["c+d.JPG"]),
        ("[!a]*.txt", ["notes.txt"]),
        ("s**", ["sub/ü.webp", "sub/deep/g.jpeg"]),
    ],
)
def test_a_glob_gives_what_it_matches(place: str, pattern: str, names: list[str]) -> None:
    storage = fill(place)
    assert sorted(uris(listed(storage, f"{place}/{pattern}"), place)) == sorted(names)


def test_a_folder_may_have_a_name_like_a_glob(tmp_path: Path) -> None:
    storage = fill(str(tmp_path / "set[1]"), ["a.jpg"])
    assert len(listed(storage, str(tmp_path / "set[1]"))) == 1


def test_a_glob_does_not_choose_buckets() -> None:
    with pytest.raises(ConfigError, match="bucket"):
        list(list_inputs(Storage(), InputSpec(uri="s3://bucket-*/a.jpg")))


def test_a_pattern_is_literal_but_for_its_wildcards() -> None:
    assert glob_regex("/a.b/[!x]?*") == r"^(?s:/a\.b/[^x][^/][^/]*)$"


def test_one_image_is_an_input(place: str) -> None:
    storage = fill(place)
    assert uris(listed(storage, f"{place}/a b.jpg"), place) == ["a b.jpg"]


def write_list(storage: Storage, place: str, kind: str, names: list[str]) -> str:
    """The names in a list of that kind, beside the images."""
    sink = pa.BufferOutputStream()
    table = pa.table({"label": [str(index) for index in range(len(names))], "file": names})
    if kind == "parquet":
        pq.write_table(table, sink)
    elif kind == "csv":
        pyarrow.csv.write_csv(table, sink)
    else:
        sink.write("\r\n".join(names).encode())
    uri = storage.join(place, f"list.{kind}")
    storage.write_bytes(uri, sink.getvalue().to_pybytes())
    return uri


@pytest.mark.parametrize("kind", ["parquet", "csv", "txt"])
def test_a_list_names_images_beside_itself_and_elsewhere(place: str, tmp_path: Path, kind: str) -> None:
    storage = fill(place)
    fill(str(tmp_path / "elsewhere"), ["far.jpg"])
    names = [*NAMES, "absent.jpg", str(tmp_path / "elsewhere/far.jpg"), "ftp://host/x.jpg", "", "a b.jpg"]
    rows = listed(storage, write_list(storage, place, kind, names), None if kind == "txt" else "file")
    assert uris(rows, place) == [name for name in names if name and not name.startswith("ftp")]
    known = {row["uri"]: row["etag"] for row in rows}
    assert known[storage.join(place, "a b.jpg")] == storage.stat(storage.join(place, "a b.jpg")).etag
    assert known[storage.join(place, "absent.jpg")] is None


def test_a_list_may_bring_its_etags(tmp_path: Path) -> None:
    storage = fill(str(tmp_path), ["a.jpg", "b.jpg"])
    pq.write_table(pa.table({"uri": ["a.jpg", "b.jpg"], "etag": ["mine", None], "bytes": [7, None]}), tmp_path / "list.parquet")
    rows = listed(storage, str(tmp_path / "list.parquet"))
    assert (rows[0]["etag"], rows[0]["bytes"]) == ("mine", 7)
    assert (rows[1]["etag"], rows[1]["bytes"]) == (storage.stat(str(tmp_path / "b.jpg")).etag, 5)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_column_that_is_not_there_is_told(tmp_path: Path, kind: str) -> None:
    uri = write_list(Storage(), str(tmp_path), kind, ["a.jpg"])
    with pytest.raises(ConfigError, match=r"'path'.*label, file"):
        listed(Storage(), uri, "path")
    with pytest.raises(ConfigError, match="several columns"):
        listed(Storage(), uri)


def test_a_list_that_is_not_one_is_told(tmp_path: Path) -> None:
    for name in ("list.parquet", "list.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00 not text, not parquet \xff")
        with pytest.raises(ConfigError, match=name):
            listed(Storage(), str(tmp_path / name))


def test_a_column_of_no_names_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": [["a.jpg"], ["b.jpg"]], "raw": [b"a", b"b"]}), tmp_path / "list.parquet")
    for column, kind in (("uri", "list"), ("raw", "binary")):
        with pytest.raises(ConfigError, match=f"column '{column}' holds {kind}.*--column"):
            list(list_inputs(Storage(), InputSpec(uri=str(tmp_path / "list.parquet"), column=column)))
    (tmp_path / "list.csv").write_text("uri,uri\na.jpg,b.jpg\n")
    with pytest.raises(ConfigError, match="2 columns named 'uri'"):
        list(list_inputs(Storage(), InputSpec(uri=str(tmp_path / "list.csv"))))


def test_a_csv_with_a_byte_order_mark_and_quotes(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes('\ufeff"file","note"\n"a, b.jpg","two\nlines"\n'.encode())
    assert uris(listed(Storage(), str(tmp_path / "list.csv"), "file"), str(tmp_path)) == ["a, b.jpg"]


def test_the_hostile_images_are_all_listed(shared_data: Path) -> None:
    rows = listed(Storage(), str(shared_data / "torture/manifest.csv"), "file")
    assert len(rows) == 689
    assert all(row["etag"] for row in rows)


# -- folders -----------------------------------------------------------------------------------------------------------


def read(uri: str, column: str | None = None) -> tuple[list[str], LeftOut]:
    """The listed URIs, and what was left out."""
    left_out = LeftOut()
    batches = list_inputs(Storage(), InputSpec(uri=uri, column=column), left_out)
    return [row["uri"] for batch in batches for row in batch.to_pylist()], left_out


HIDDEN = ["._a.jpg", "sub/._b.jpg", ".thumbnails/c.jpg", "__MACOSX/d.jpg", "sub/@eaDir/e.jpg", ".DS_Store", "..f.jpg"]


def test_files_of_other_systems_are_left_out(place: str) -> None:
    fill(place, ["a.jpg", "sub/a.._.jpg", "Thumbs.db", *HIDDEN])
    found, left_out = read(place)
    assert sorted(found) == [f"{place}/a.jpg", f"{place}/sub/a.._.jpg"]
    assert left_out.counts() == {"other_files": 2, "other_systems": 6}
    found, left_out = read(f"{place}/**/*.jpg")
    assert sorted(found) == [f"{place}/a.jpg", f"{place}/sub/a.._.jpg"]
    assert left_out.counts() == {"other_systems": 6}


def test_what_is_left_out_is_named_by_its_path_below_the_folder(place: str) -> None:
    fill(place, ["a.jpg", ".thumbnails/b.jpg", "notes/c.txt", "phone/d.HEIC", "phone/e.dng"])
    _, left_out = read(place)
    assert str(left_out) == (
        "left out: 1 without an image's suffix (notes/c.txt), 1 hidden or of other systems (.thumbnails/b.jpg), "
        "2 images of formats that are not read (phone/d.HEIC)"
    )


def test_a_pattern_misses_nothing_but_what_it_could_match(tmp_path: Path) -> None:
    fill(str(tmp_path), ["a.jpg", "b.png", "sub/c.jpg", "sub/deep/d.jpg"])
    for link in ("gone.jpg", "gone.txt", "sub/gone.jpg", "sub/deep/gone.jpg"):
        (tmp_path / link).symlink_to("/nowhere")
    (tmp_path / "sub/all").symlink_to(tmp_path)
    found, left_out = read(f"{tmp_path}/*.jpg")
    assert (found, str(left_out)) == ([f"{tmp_path}/a.jpg"], f"left out: 1 link that leads nowhere ({tmp_path}/gone.jpg)")
    found, left_out = read(f"{tmp_path}/*/*/*.jpg")
    assert (found, left_out.counts()) == ([f"{tmp_path}/sub/deep/d.jpg"], {"broken_links": 1, "linked_folders": 1})
    found, left_out = read(f"{tmp_path}/**/*.jpg")
    assert (len(found), left_out.counts()) == (3, {"broken_links": 3, "linked_folders": 1})


def test_a_pattern_lists_no_folder_that_it_cannot_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(str(tmp_path), ["a/x.jpg", "b/x.jpg", "a/sub/x.jpg"])
    seen: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr("masklake.pipeline.storage.walk.os.scandir", lambda folder: seen.append(folder) or scandir(folder))
    assert read(f"{tmp_path}/a*/*.jpg")[0] == [f"{tmp_path}/a/x.jpg"]
    assert seen == [str(tmp_path), f"{tmp_path}/a"]


def test_a_pattern_that_ends_in_a_slash_or_has_braces_is_told(place: str) -> None:
    fill(place, ["a/x.jpg"])
    with pytest.raises(ConfigError, match=r"no file ends in a slash; write .*/\*/\* or .*/\*/\*\*"):
        read(f"{place}/*/")
    assert "braces are literal" in nothing_found(Storage(), f"{place}/*.{{jpg,png}}")


def test_what_is_hidden_can_be_asked_for(tmp_path: Path) -> None:
    fill(str(tmp_path / ".cache/.photos"), ["a.jpg", ".b.jpg"])
    assert read(str(tmp_path / ".cache/.photos"))[0] == [f"{tmp_path}/.cache/.photos/a.jpg"]
    assert read(str(tmp_path / ".cache/.photos/.*"))[0] == [f"{tmp_path}/.cache/.photos/.b.jpg"]
    assert read(str(tmp_path / "*/.photos/*.jpg"))[0] == [f"{tmp_path}/.cache/.photos/{name}" for name in (".b.jpg", "a.jpg")]
    assert read(str(tmp_path / ".cache/.photos/.b.jpg"))[0] == [f"{tmp_path}/.cache/.photos/.b.jpg"]


def test_every_suffix_that_the_decoder_reads_is_an_image_or_named_as_none() -> None:
    Image.init()
    read_by_pillow = {suffix for suffix, name in Image.registered_extensions().items() if name in {*FORMATS, "MPO"}}
    assert read_by_pillow <= {*IMAGE_SUFFIXES, *OTHER_SUFFIXES}
    assert not set(IMAGE_SUFFIXES) & set(OTHER_SUFFIXES)
    assert not {*IMAGE_SUFFIXES, *OTHER_SUFFIXES} & set(UNREAD_SUFFIXES)
    beyond_pillow = {".jif", ".jfi", ".pjpeg", ".pjp"}  # JPEG files of other names
    assert {*IMAGE_SUFFIXES, *OTHER_SUFFIXES} - read_by_pillow == beyond_pillow


def test_the_folder_beside_is_another(place: str) -> None:
    fill(place, ["photos/a.jpg", "photos2/b.jpg", "photos.jpg"])
    for uri in (f"{place}/photos", f"{place}/photos/"):
        assert read(uri)[0] == [f"{place}/photos/a.jpg"]
        assert InputSpec(uri=uri).resolved(Storage()).uri == f"{place}/photos"


@pytest.mark.slow
def test_a_last_slash_chooses_between_an_object_and_a_folder(s3: Any) -> None:
    for key in ("a", "a/x.jpg", "mark", "mark/y.jpg", "mark/", "empty.jpg"):
        s3.put(key, b"" if key in ("mark", "mark/", "empty.jpg") else b"\xff\xd8\xff\xe0\0")
    assert read(s3.uri("a"))[0] == [s3.uri("a")]
    assert read(s3.uri("a") + "/")[0] == [s3.uri("a/x.jpg")]
    assert read(s3.uri("mark"))[0] == [s3.uri("mark/y.jpg")], "an empty object of a folder's name marks the folder"
    assert read(s3.uri("mark") + "/")[0] == [s3.uri("mark/y.jpg")]
    assert read(s3.uri("empty.jpg"))[0] == [s3.uri("empty.jpg")]


def test_a_local_file_with_a_last_slash_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputNotFoundError, match=r"a\.jpg/: is a file where a folder is needed"):
        read(f"{tmp_path}/a.jpg/")


# -- lists in the forms that people have -------------------------------------------------------------------------------

LISTS: dict[str, bytes] = {
    "semicolons.csv": b"label;file\n1;a.jpg\n2;b.jpg\n",
    "tabs.csv": b"label\tfile\n1\ta.jpg\n2\tb.jpg\n",
    "tabs.tsv": b"label\tfile\n1\ta.jpg\n2\tb.jpg\n",
    "bars.csv": b"label|file\r\n1|a.jpg\r\n2|b.jpg\r\n",
    "excel.csv": b"sep=;\r\nlabel;file\r\n1;a.jpg\r\n2;b.jpg\r\n",
    "utf16.csv": "label,file\r\n1,a.jpg\r\n2,b.jpg\r\n".encode("utf-16"),
    "utf32.csv": "label,file\r\n1,a.jpg\r\n2,b.jpg\r\n".encode("utf-32"),
    "spaces.csv": b'label, file\n1, a.jpg\n2, "b.jpg"\n',
    "columns.csv": b"file  , label\na.jpg , 1\nb.jpg , 2\n",
    "bom.csv": "\ufefffile\na.jpg\n\nb.jpg\n".encode(),
    "quoted.csv": b'"label","file"\n"one, two","a.jpg"\n"three\nfour","b.jpg"\n',
    "comments.csv": b"# made by me, by hand\n#\n\nlabel,file\n1,a.jpg\n2,b.jpg\n",
    "file.CSV": b"file\ra.jpg\rb.jpg",
    "packed.csv.gz": gzip.compress(b"label,file\n1,a.jpg\n2,b.jpg\n"),
    "packed.jsonl.xz": lzma.compress(b'{"file": "a.jpg"}\n{"file": "b.jpg"}\n'),
    "packed.csv.bz2": bz2.compress(b"file\na.jpg\nb.jpg\n"),
    "objects.jsonl": b'{"file": "a.jpg", "n": 1}\n\n{"file": "b.jpg", "m": [2]}\n',
    "objects.ndjson": b'\xef\xbb\xbf{"file": "a.jpg"}\r\n{"file": "b.jpg"}\r\n',
    "objects.json": b'[\n {"file": "a.jpg"},\n {"file": "b.jpg"}\n]',
    "lines.json": b'{"file": "a.jpg"}\n{"file": "b.jpg"}\n',
}
NAMELESS: dict[str, bytes] = {
    "plain.txt": b"# images\na.jpg\n\n#b.jpg\nb.jpg",
    "crlf.lst": b"a.jpg\r\nb.jpg\r\n",
    "mac.list": b"a.jpg\rb.jpg\r",
    "utf16.txt": "a.jpg\r\nb.jpg\r\n".encode("utf-16"),
    "utf16be.txt": b"\xfe\xff" + "a.jpg\nb.jpg".encode("utf-16-be"),
    "packed.txt.gz": gzip.compress(b"a.jpg\n") + gzip.compress(b"b.jpg\n"),
    "headless.csv": b"a.jpg,1\nb.jpg,2\n",
    "headless.tsv": b"1\ta.jpg\n2\tb.jpg\n",
    "one.csv": b"a.jpg\nb.jpg\n",
    "spaces_headless.csv": b"1, a.jpg\n2, b.jpg\n",
    "utf32be.txt": b"\0\0\xfe\xff" + "a.jpg\nb.jpg".encode("utf-32-be"),
    "empty_objects.jsonl": b'{}\n{"file": "a.jpg"}\n{}\n{"file": "b.jpg"}\n',
    "Uri.csv": b" URI ,label\na.jpg,1\nb.jpg,2\n",
    "names.json": b'["a.jpg", "b.jpg"]',
    "names.jsonl": b'"a.jpg"\n"b.jpg"\n',
}


@pytest.mark.parametrize("name", [*LISTS, *NAMELESS])
def test_a_list_in_any_form(tmp_path: Path, name: str) -> None:
    fill(str(tmp_path), ["a.jpg", "b.jpg"])
    (tmp_path / name).write_bytes((LISTS | NAMELESS)[name])
    assert read(str(tmp_path / name), "file" if name in LISTS else None)[0] == [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"]


@pytest.mark.parametrize(
    ("names", "rows", "column"),
    [
        (["sub/000", "sub/001"], b"sub/000\nsub/001\n", None),
        (["000", "001"], b"000\n001\n", None),
        (["IMG_1", "IMG_2"], b"IMG_1\nIMG_2\n", None),
        (["sub/000", "sub/001"], b"sub/000,cat\nsub/001,dog\n", None),
        (["sub/000", "sub/001"], b"7,sub/000\n8,sub/001\n", None),
        (["IMG_1", "IMG_2"], b"IMG_1;cat;0.5\n\nIMG_2;dog;0.7\n", None),
        (["IMG_1", "IMG_2"], b"IMG_1,cat\nIMG_2,dog\n", "1"),
        (["000", "001"], b"000,1\n001,0\n", "1"),
        (["sub/a", "sub/b"], b"sub/a,cat\nsub/b,dog\n", "1"),
    ],
)
def test_a_list_without_a_header_and_without_suffixes_loses_no_name(
    tmp_path: Path, names: list[str], rows: bytes, column: str | None
) -> None:
    fill(str(tmp_path), names)
    (tmp_path / "list.csv").write_bytes(rows)
    assert read(str(tmp_path / "list.csv"), column)[0] == [f"{tmp_path}/{name}" for name in names]


@pytest.mark.parametrize(
    ("rows", "column"),
    [
        (b"image/name,s3_uri\nsub/000,7\nsub/001,8\n", "image/name"),
        (b"file,2023\nsub/000,17\nsub/001,18\n", "file"),
        (b"0,1\nsub/000,7\nsub/001,8\n", "0"),
        (b"s3_key\nsub/000\nsub/001\n", None),
        (b"uri,k1\nsub/000,k2\nsub/001,k3\n", None),
    ],
)
def test_a_header_with_numbers_or_slashes_is_one(tmp_path: Path, rows: bytes, column: str | None) -> None:
    fill(str(tmp_path), ["sub/000", "sub/001"])
    (tmp_path / "list.csv").write_bytes(rows)
    assert read(str(tmp_path / "list.csv"), column)[0] == [f"{tmp_path}/sub/000", f"{tmp_path}/sub/001"]


def test_an_image_without_a_suffix_is_one_image_and_a_list_without_one_is_refused(tmp_path: Path) -> None:
    for name, content in {
        "scan": b"\x89PNG\r\n\x1a\n\0\0",
        "digits": b"P3\n1 1\n255\n0 0 0\n",
        "list": b"a.jpg\nb.jpg\n",
    }.items():
        (tmp_path / name).write_bytes(content)
    assert read(f"{tmp_path}/scan")[0] == [f"{tmp_path}/scan"]
    assert read(f"{tmp_path}/digits")[0] == [f"{tmp_path}/digits"]
    with pytest.raises(ConfigError, match=r"/list: is text and no image; if it is a list, name it \.txt"):
        read(f"{tmp_path}/list")


def test_what_an_input_without_an_image_is_told_names_what_to_check(tmp_path: Path) -> None:
    (tmp_path / "header.csv").write_bytes(b"uri\n")
    storage = Storage()
    assert read(f"{tmp_path}/header.csv")[0] == []
    assert nothing_found(storage, f"{tmp_path}/header.csv") == "is a list that names no image; write one per row"
    assert nothing_found(storage, f"{tmp_path}/[") == "matches no image; check the pattern"
    assert nothing_found(storage, str(tmp_path)) == "holds no image; check the path"


def test_comments_and_blank_lines_are_counted(tmp_path: Path) -> None:
    fill(str(tmp_path), ["a.jpg", "#1.jpg"])
    (tmp_path / "list.txt").write_bytes(b"# mine\n\na.jpg\n#1.jpg\n./#1.jpg\n   \n")
    found, left_out = read(str(tmp_path / "list.txt"))
    assert found == [f"{tmp_path}/a.jpg", f"{tmp_path}/#1.jpg"]
    assert str(left_out) == "left out: 2 comments (# mine), 2 rows without a name"


def test_names_that_nothing_can_be_read_by_are_left_out_by_reason(tmp_path: Path) -> None:
    fill(str(tmp_path), ["a.jpg", "sub/b.jpg"])
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    names: dict[str, list[str]] = {
        "windows_paths": ["C:\\photos\\a.jpg", "d:/a.jpg", "\\\\server\\share\\a.jpg"],
        "no_client": ["https://host/a.jpg", "s3:///a.jpg", "file://elsewhere/a.jpg", "gs://b/a//b.jpg"],
        "slash_at_end": ["sub/", "a.jpg/"],
        "folders": ["sub"],
        "not_regular": ["pipe.jpg"],
        "broken_links": ["self.jpg"],
        "no_such_name": ["n" * 300, "zero\0.jpg", "s3://b/" + "\u00fc" * 513, "s3://b"],
    }
    rows = ["a.jpg", *[name for group in names.values() for name in group], "missing.jpg", "a.jpg/below.jpg"]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    found, left_out = read(str(tmp_path / "list.json"))
    assert found == [f"{tmp_path}/{name}" for name in ("a.jpg", "missing.jpg", "a.jpg/below.jpg")]
    assert left_out.counts() == {reason: len(group) for reason, group in names.items()}
    assert str(left_out).startswith(
        "left out: 3 Windows paths (C:\\photos\\a.jpg), 4 addresses that no storage client here reads"
    )


def test_a_line_that_is_not_utf8_does_not_end_the_list(tmp_path: Path) -> None:
    fill(str(tmp_path), ["a.jpg"])
    (tmp_path / "list.txt").write_bytes(b"a.jpg\nM\xfcller.jpg\n")
    found, left_out = read(str(tmp_path / "list.txt"))
    assert found == [f"{tmp_path}/a.jpg"]
    assert left_out.counts() == {"not_utf8": 1}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("coco.json", b'{"images": [{"id": 1}], "annotations": []}', "COCO.*folder of its images"),
        ("pretty.json", b'{\n "info": {},\n "images": []\n}', "COCO.*folder of its images"),
        ("list.jsonl", b'"a.jpg"\nb.jpg\n', "line 2 is not JSON"),
        ("list.json", b"[1, 2]", "entry 1 is 1 and no name; write each entry as a string, or as an object"),
        ("nested.json", b'[["a.jpg"]]', r'entry 1 is \["a\.jpg"\] and no name; write each entry'),
        ("many.json", b'{"images": ["a.jpg", "b.jpg"]}', "entry 1 has a list as 'images'; write the names as an array"),
        ("number.json", b'[{"n": 1}]', "entry 1 has 1 as 'n' and no name; choose the key of the names with --column"),
        ("key.json", b'[{"file": "a.jpg", "n": 1}]', r"several columns.*--column: file, n"),
        ("ragged.csv", b"uri,label\na.jpg,1\nb, c.jpg,2\n", "line 3 has 3 fields and the first has 2.*quotes"),
        ("open.csv", b'file\n"a.jpg\nb.jpg\n', "cannot be read as a csv list"),
        ("two.csv", b"a.jpg,b.jpg\n", "no header, and images in columns 1, 2"),
        ("numbers.csv", b"000,1\n001,0\n", r"no header, and images in columns 1, 2; choose with --column 1"),
        ("names.csv", b"cat,x\ndog,y\n", r"none of them `uri`; .*: cat, x \(the list's first line; if that is an image's"),
        ("pairs.lst", b"0\t3.0\ta.jpg\n1\t1.0\tb.jpg\n", r"several columns in each line.*\.tsv, and choose a column"),
        ("commas.txt", b"# mine\na.jpg,3\nb.jpg,1\n", r"several columns.*\.csv, and choose a column with --column"),
        ("labels.txt", b"sub/a.jpg 3\nsub/b.JPG 1\nsub/c", "several columns.*keep the names alone"),
        ("zero.txt", b"a.jpg\0b.jpg", "zero bytes.*UTF-8"),
        ("cut.txt.gz", gzip.compress(b"a.jpg\n" * 100, mtime=0)[:-9], "cannot be read as a text list"),
        ("not.csv.gz", b"\x1f\x8bno gzip", "cannot be read as a csv list"),
        ("photos.xlsx", b"PK", "is a spreadsheet; save it as CSV"),
        ("list.csv.zst", b"\x28\xb5\x2f\xfd", r"is compressed in a way that lists cannot be.*\.gz, \.bz2 or \.xz"),
        ("photos.zip", b"PK", "is an archive; unpack it"),
    ],
)  # fmt: skip
def test_what_is_no_list_is_told_in_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as told:
        read(str(tmp_path / name))
    assert str(tmp_path / name) in str(told.value)
    assert "\n" not in str(told.value)


def test_the_names_of_a_text_list_may_hold_any_sign(tmp_path: Path) -> None:
    names = ["a, b.jpg", "c 1.jpg", "d.jpg 2", "e;f", "g.jpg, h.jpg"]
    fill(str(tmp_path), names)
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert read(str(tmp_path / "list.txt"))[0] == [f"{tmp_path}/{name}" for name in names]


def test_a_column_of_a_list_without_a_header_has_a_number(tmp_path: Path) -> None:
    fill(str(tmp_path), ["a.jpg", "b.jpg"])
    (tmp_path / "two.csv").write_bytes(b"a.jpg,b.jpg\n")
    assert read(str(tmp_path / "two.csv"), "2")[0] == [f"{tmp_path}/b.jpg"]
    (tmp_path / "list.txt").write_bytes(b"a.jpg\n")
    with pytest.raises(ConfigError, match="has no columns; leave out --column file"):
        read(str(tmp_path / "list.txt"), "file")


def test_an_input_that_this_system_cannot_name_is_told() -> None:
    with pytest.raises(ConfigError, match=r"C:\\photos: is a Windows path"):
        read("C:\\photos")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read("photos\udcff")


@pytest.mark.slow
def test_a_list_at_a_key_that_obstore_cannot_name(s3: Any) -> None:
    for key in ("/list.csv", "list.csv", "/a.jpg"):
        s3.put(key, b"uri\na.jpg\n" if key == "/list.csv" else b"")
    assert read(f"s3://{s3.bucket}//list.csv")[0] == [f"s3://{s3.bucket}//a.jpg"]
