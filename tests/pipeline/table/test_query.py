"""SQL over a table: four views, one snapshot, no masks read unless requested, nothing written."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from masklake.pipeline.errors import AccessDeniedError, InputNotFoundError, QueryError, TableError
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.query import VIEWS, connect_duckdb, query, stream, with_exact_values

DAY = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def table(place: str, write_run: Any, make_row: Any) -> str:
    """Two nights: a.jpg labelled twice, b.jpg only the first time, c.jpg never."""
    failed = {"status": "fetch_error", "error": "timed out"}
    write_run(
        place,
        "night-1",
        [
            make_row(0, "a.jpg", labelled_at=DAY, instances=[], rles=[], keypoints=[]),
            make_row(1, "b.jpg", labelled_at=DAY),
            make_row(2, "c.jpg", labelled_at=DAY, **failed),
        ],
        rows_per_file=2,
    )
    later = DAY + timedelta(days=1)
    write_run(
        place,
        "night-2",
        [
            make_row(0, "a.jpg", labelled_at=later),
            make_row(1, "b.jpg", labelled_at=later, **failed),
            make_row(2, "c.jpg", labelled_at=later, status="missing"),
        ],
    )
    return place


def ask(table: str, sql: str, **parameters: Any) -> list[tuple[Any, ...]]:
    answer = query(Storage(), table, sql, parameters)
    return [tuple(row.values()) for row in answer.to_pylist()]


def test_images_has_a_row_an_image_and_run(table: str) -> None:
    assert ask(table, "SELECT count(*), count(DISTINCT run) FROM images") == [(6, 2)]
    assert ask(table, "SELECT status, count(*) FROM images WHERE run = 'night-2' GROUP BY status ORDER BY status") == [
        ("fetch_error", 1),
        ("missing", 1),
        ("ok", 1),
    ]


def test_detections_has_a_row_an_instance(table: str) -> None:
    rows = query(Storage(), table, "SELECT * FROM detections WHERE run = 'night-2' ORDER BY score DESC").to_pylist()
    assert [row["category"] for row in rows] == ["cat", "dog"]
    assert rows[0] == {
        "uri": "a.jpg",
        "image_id": 0,
        "run": "night-2",
        "model_id": "tiny-0123456789ab",
        "label_id": "label-a",
        "labelled_at": DAY + timedelta(days=1),
        "category_id": 1,
        "category": "cat",
        "score": 0.875,
        "x1": 1.0,
        "y1": 2.0,
        "x2": 11.0,
        "y2": 22.0,
        "area": 120,
        "rle": b"counts-cat",
        "keypoints": [{"x": 1.5, "y": 2.5, "score": 3.0}],
        "width": 640,
        "height": 480,
    }


def test_current_is_the_newest_ok_row_else_the_newest(table: str) -> None:
    assert ask(table, "SELECT uri, run, status FROM current_images ORDER BY uri") == [
        ("a.jpg", "night-2", "ok"),
        ("b.jpg", "night-1", "ok"),
        ("c.jpg", "night-2", "missing"),
    ]
    assert ask(table, "SELECT uri, count(*) FROM current_detections GROUP BY uri ORDER BY uri") == [("a.jpg", 2), ("b.jpg", 2)]


def test_a_boxes_only_run_has_null_masks(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    uri = str(tmp_path / "table")
    write_run(uri, "night-1", [make_row(0, "a.jpg", rles=[], keypoints=[])])
    assert ask(uri, "SELECT category, rle, keypoints FROM detections ORDER BY category") == [
        ("cat", None, None),
        ("dog", None, None),
    ]


def test_times_are_utc_and_can_be_grouped(table: str) -> None:
    sql = "SELECT date_trunc('day', labelled_at) AS day, count(*) FROM images GROUP BY day ORDER BY day"
    assert ask(table, sql) == [(DAY, 3), (DAY + timedelta(days=1), 3)]


def test_parameters_are_values(table: str) -> None:
    assert ask(table, "SELECT count(*) FROM images WHERE uri = $uri", uri="a.jpg' OR true --") == [(0,)]


def test_masks_are_read_only_when_asked_for(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    """The bytes this process reads from disk, counted by the kernel, while a query runs."""
    if not Path("/proc/self/io").exists():
        pytest.skip("the kernel does not count bytes for us here")
    noise = np.random.default_rng(0)
    rows = [make_row(index, f"{index}.jpg", rles=[noise.bytes(20_000), noise.bytes(20_000)]) for index in range(100)]
    uri = str(tmp_path / "table")
    write_run(uri, "night-1", rows, rows_per_file=25)
    for sql in (
        "SELECT count(*) FROM images",
        "SELECT category, count(*), avg(score), max(area) FROM detections GROUP BY category",
        "SELECT category, count(*) FROM current_detections GROUP BY category",
    ):
        assert _bytes_read(uri, sql) < 400_000, sql
    assert _bytes_read(uri, "SELECT sum(octet_length(rle)) FROM current_detections") > 4_000_000


def _bytes_read(table: str, sql: str) -> int:
    def counter() -> int:
        line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
        return int(line.split()[1])

    with connect_duckdb(Storage(), table) as connection:
        before = counter()
        connection.sql(sql).fetchall()
        return counter() - before


def test_a_query_sees_one_snapshot(table: str, write_run: Any, make_row: Any) -> None:
    with connect_duckdb(Storage(), table) as connection:
        write_run(table, "night-3", [make_row(0, "new.jpg")])
        assert connection.sql("SELECT count(*) FROM images").fetchall() == [(6,)]
    assert ask(table, "SELECT count(*) FROM images") == [(7,)]


@pytest.mark.parametrize(
    "sql", ["SELECT nothing FROM detections", "SELECT * FROM detection", "SELEC 1", "SELECT uri::INT FROM images"]
)
def test_sql_that_fails_says_why_and_what_there_is(tmp_path: Path, write_run: Any, make_row: Any, sql: str) -> None:
    write_run(str(tmp_path), "night-1", [make_row(0, "a.jpg")])
    with pytest.raises(QueryError, match=r"(?s)Error.*current_images: image_id, uri.*current_detections: uri.*category_id"):
        query(Storage(), str(tmp_path), sql)


def test_only_the_views_are_listed(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    write_run(str(tmp_path), "night-1", [make_row(0, "a.jpg")])
    for sql in ("SHOW TABLES", "SELECT table_name FROM information_schema.tables", "SELECT name FROM (SHOW ALL TABLES)"):
        assert sorted(name for (name,) in ask(str(tmp_path), sql)) == sorted(VIEWS), sql
    assert ask(str(tmp_path), "SELECT column_name FROM (DESCRIBE images) LIMIT 2") == [("image_id",), ("uri",)]
    assert len(ask(str(tmp_path), "SUMMARIZE images")) == len(ask(str(tmp_path), "DESCRIBE images"))
    assert ask(str(tmp_path), "SELECT cat FROM (PIVOT detections ON category USING count(*) GROUP BY uri)") == [(1,)]


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE x AS SELECT 1",
        "INSERT INTO images VALUES (1)",
        "DELETE FROM images",
        "DROP VIEW images",
        "COPY images TO 'x.csv'",
        "SET threads = 1",
        "BEGIN",
        "USE memory",
        "EXPORT DATABASE 'x'",
    ],
)
def test_statements_that_write_are_refused_by_name(tmp_path: Path, write_run: Any, make_row: Any, sql: str) -> None:
    write_run(str(tmp_path), "night-1", [make_row(0, "a.jpg")])
    with pytest.raises(QueryError, match=r"statements are refused.*--output"):
        query(Storage(), str(tmp_path), sql)


def test_one_question_at_a_time(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    table = write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")])
    with pytest.raises(QueryError, match="several statements"):
        query(Storage(), table.uri, "DROP VIEW images; SELECT 1")
    assert query(Storage(), table.uri, "SELECT 1 AS one;").to_pylist() == [{"one": 1}]


@pytest.mark.parametrize("sql", ["", " ;\n", "-- nothing", "/* nothing */"])
def test_an_empty_query_is_told(tmp_path: Path, write_run: Any, make_row: Any, sql: str) -> None:
    write_run(str(tmp_path), "night-1", [make_row(0, "a.jpg")])
    with pytest.raises(QueryError, match="current_detections"):
        query(Storage(), str(tmp_path), sql)


def test_a_query_can_neither_read_nor_write_files(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    uri = str(tmp_path / "table")
    write_run(uri, "night-1", [make_row(0, "a.jpg")])
    secret = tmp_path / "secret.csv"
    secret.write_text("x\n1\n")
    for sql in (
        f"SELECT * FROM read_csv('{secret}')",
        f"SELECT * FROM '{secret}'",
        f"COPY (SELECT 1) TO '{tmp_path}/out.csv'",
        f"ATTACH '{tmp_path}/other.db' AS other",
        "SET enable_external_access = true",
        "INSTALL httpfs",
    ):
        with pytest.raises(QueryError):
            query(Storage(), uri, sql)
    assert not (tmp_path / "out.csv").exists()


def test_a_query_finds_no_variables_of_this_process(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    write_run(str(tmp_path), "night-1", [make_row(0, "a.jpg")])
    private = write_run(str(tmp_path / "other"), "night-1", [make_row(0, "b.jpg")]).dataset()
    assert private is not None
    with pytest.raises(QueryError, match="private"):
        query(Storage(), str(tmp_path), "SELECT * FROM private")


def test_a_large_answer_streams(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    write_run(str(tmp_path), "night-1", [make_row(0, "a.jpg")])
    with stream(Storage(), str(tmp_path), "SELECT * FROM range(25000), images") as answer:
        sizes = [batch.num_rows for batch in answer]
    assert sum(sizes) == 25_000
    assert len(sizes) > 1


def test_a_table_without_a_run_is_told(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    with pytest.raises(TableError, match="does not exist"):
        query(Storage(), str(tmp_path / "nothing"), "SELECT 1")
    table = write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")], commit=False)
    table.initialise()
    with pytest.raises(TableError, match="no committed run"):
        query(Storage(), str(tmp_path / "table"), "SELECT 1")


def test_the_views_are_the_documented_ones(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    write_run(str(tmp_path), "night-1", [make_row(0, "a.jpg")])
    for view in VIEWS:
        assert ask(str(tmp_path), f"SELECT count(*) > 0 FROM {view}") == [(True,)]


@pytest.mark.slow
def test_a_store_that_refuses_the_data_is_no_fault_of_the_sql(s3: Any, s3_proxy: Any, write_run: Any, make_row: Any) -> None:
    write_run(s3.uri("table"), "night-1", [make_row(0, "a.jpg")])
    s3_proxy.answer(403, "ExpiredToken", "GET", "part-")
    with pytest.raises(AccessDeniedError, match="table: the session's credentials have expired") as refused:
        query(Storage(), s3.uri("table"), "SELECT max(uri) FROM images")
    assert "views" not in str(refused.value)


def test_a_data_file_that_is_gone_is_no_fault_of_the_sql(tmp_path: Path, write_run: Any, make_row: Any) -> None:
    write_run(str(tmp_path / "table"), "night-1", [make_row(0, "a.jpg")])
    next((tmp_path / "table").glob("run=*/*.parquet")).unlink()
    with pytest.raises(InputNotFoundError, match="table: not found"):
        query(Storage(), str(tmp_path / "table"), "SELECT max(uri) FROM images")


@pytest.mark.parametrize(
    ("sql", "value"),
    [
        ("340282366920938463463374607431768211455::UHUGEINT", "340282366920938463463374607431768211455"),
        ("12345678901234567890123456789012345678901234::BIGNUM", "12345678901234567890123456789012345678901234"),
        ("'12:00:00+02'::TIMETZ", "12:00:00+02"),
        ("'12:00:00.000000001'::TIME_NS", "12:00:00.000000001"),
        ("'0101'::BIT", "0101"),
        ("INTERVAL '1 year 3 days 4 hours'", "1 year 3 days 04:00:00"),
        ("NULL::INTERVAL", None),
        ("[[INTERVAL 1 DAY], []]", [["1 day"], []]),
        ("[INTERVAL 1 DAY]::INTERVAL[1]", ["1 day"]),
        ("""{'a "b"': INTERVAL 1 DAY, 'B c': 2::UHUGEINT, 'd': 3}""", {'a "b"': "1 day", "B c": "2", "d": 3}),
        ("MAP {INTERVAL 1 DAY: [INTERVAL 1 MONTH]}", [("1 day", ["1 month"])]),
        ("union_value(a := INTERVAL 1 DAY)", "1 day"),
        ("union_value(a := 2)", 2),
        ("170141183460469231731687303715884105727::HUGEINT", Decimal("170141183460469231731687303715884105727")),
    ],
)
def test_values_that_arrow_or_python_has_not_are_duckdbs_text(sql: str, value: Any) -> None:
    with duckdb.connect() as connection:
        answer = with_exact_values(connection.sql(f'SELECT 1 AS n, {sql} AS n, $x AS "a b" ORDER BY 1', params={"x": 7}))
        table = answer.to_arrow_table()
    assert [column.to_pylist() for column in table.columns] == [[1], [value], [7]]
    assert table.schema.names[-1] == "a b"
