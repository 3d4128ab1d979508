"""The options of a training run, from a file and the command line; wrong ones are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from masklake.jobs.training.options import read_options
from masklake.model.errors import ConfigError
from masklake.pipeline.errors import InputNotFoundError


def test_a_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('train = "a.json"\noutput = "o"\nname = "n"\nseed = 3\n[recipe]\nepochs = 9\nbatch_size = 3\n')
    read = read_options(str(config), {"name": "m", "seed": None, "recipe": {"epochs": 2, "batch_size": None}})
    assert (read.name, read.seed, read.recipe) == ("m", 3, {"epochs": 2, "batch_size": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train = 'a'\noutput = 'o'\nname = 'n'\nworker = 2", "worker: no such option; did you mean workers"),
        ("train = 'a'\noutput = 'o'\nname = 'n'\nepochs = 2", r"epochs is an option of the table \[recipe\]"),
        ("train = 'a'\noutput = 'o'\nname = 'n'\nxyzzy = 2", "xyzzy: no such option$"),
        ("train = 'a'\noutput = 'o'\nname = 'n'\n[storage]\nregon = 'r'", "storage.regon: no such option$"),
        (
            "train = 'a'\noutput = 'o'\nname = '../n'",
            r"run\.toml: name: '\.\./n' is not a run's name: use letters from a to z, digits",
        ),
        (
            "output = 'o'\nname = 'n'",
            r"^a training run needs TRAIN \(the COCO JSON file to train on\): give it on .* as train in the file of --config",
        ),
        ("", r"needs TRAIN \(.*\), --output \(.*\) and --name \(.*\): .* as train, output and name in"),
        ("train = 'a'\noutput = 'o'\nname = 'n'\nmax_dets = []", "max_dets: tuple should have at least 1 item"),
        ("train = 'a'\noutput = 'o'\nname = 'n'\ntasks = []", "tasks: frozenset should have at least 1 item"),
        ("train = ", "is not TOML"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_options(str(tmp_path / "run.toml"), {})
    with pytest.raises(InputNotFoundError, match="--config"):
        read_options(str(tmp_path / "none.toml"), {})


@pytest.mark.parametrize("name", ["a/b", "", ".a", "-a", "a b", "ä", "a\n"])
def test_a_name_that_no_folder_has_is_refused_in_words(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^--name: '[^']*' is not a run's name: use letters .*'\.', '-' and '_', and begin with"
    ):
        read_options(None, {"train": "a.json", "output": "o", "name": name})
    assert read_options(None, {"train": "a.json", "output": "o", "name": "2026-11_a.B"}).name == "2026-11_a.B"


def test_an_option_is_named_as_it_was_given(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("train = 'a'\noutput = 'o'\nname = 'n'\nworkers = 0")
    with pytest.raises(ConfigError, match=r"^--max-failures: input should be greater than or equal to 0$"):
        read_options(None, {"train": "a.json", "output": "o", "name": "n", "max_failures": -1})
    with pytest.raises(ConfigError, match=r"^\S+run\.toml: workers: input should be greater than 0; --seed: input should be"):
        read_options(str(config), {"seed": -1})
