"""A line beside a progress bar stands on its own, so that a search for `^masklake:` in a log finds it."""

import io

from tqdm import tqdm

from masklake.jobs.terminal.own_line import own_line


def test_a_line_beside_a_progress_bar_starts_a_new_one() -> None:
    assert own_line("masklake: stopped.\n") == b"masklake: stopped.\n"
    with tqdm(total=2, file=io.StringIO(), disable=True):
        assert own_line("masklake: stopped.\n") == b"masklake: stopped.\n"
    with tqdm(total=2, file=io.StringIO()):
        assert own_line("masklake: stopped.\n") == b"\nmasklake: stopped.\n"
    assert own_line("masklake: stopped.\n") == b"masklake: stopped.\n"
