"""The command line as a whole: it starts fast, and every error is one line without a traceback."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from pydantic import BaseModel
from typer.main import get_command

from masklake.jobs.cli import main
from masklake.jobs.commands import app, print_json
from masklake.jobs.terminal.stop_lines import AFTER_A_STOP, command_of, stopped_line

COMMANDS = set(get_command(app).commands)  # type: ignore[attr-defined]
HEAVY = ("pydantic", "torch", "ray", "duckdb", "pyarrow", "matplotlib", "deltalake")


def run(*arguments: str, code: str = "from masklake.jobs.cli import main; main()") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


IMPORTED = f"""
import sys
from masklake.jobs.cli import main
try:
    main()
finally:
    sys.stderr.write(str([name for name in {HEAVY} if name in sys.modules]))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [((), 2), (("--help",), 0), (("label", "--help"), 0), (("train", "--nothing"), 2), (("quer",), 2)],
)
def test_help_and_wrong_usage_import_nothing_heavy(arguments: tuple[str, ...], code: int) -> None:
    done = run(*arguments, code=IMPORTED)
    assert (done.returncode, done.stderr.splitlines()[-1][-2:]) == (code, "[]")


def test_a_shell_completes_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        environment = {"_MASKLAKE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        code = "import sys; sys.argv[0] = 'masklake'; from masklake.jobs.cli import main; main()"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment).stdout.split()

    assert completed("masklake la") == ["label"]
    assert completed("masklake label --prec") == ["--precision"]
    assert completed("masklake label --precision f") == ["fp32", "fp16"]


def test_an_error_is_one_line_and_its_exit_code() -> None:
    done = run("convert", "nowhere.pth", "out.safetensors", "--preset", "no_such_preset")
    assert done.returncode == 10
    assert done.stderr.startswith("masklake: error: ")
    assert "tiny" in done.stderr, "the message lists the known presets"
    assert "Traceback" not in done.stderr


def test_a_name_with_line_breaks_and_colours_is_one_line_of_an_error(tmp_path: Path) -> None:
    done = run("convert", f"{tmp_path}/a\n\x1b[31mb.pth", "out.safetensors", "--preset", "tiny")
    assert (done.returncode, done.stderr) == (11, f"masklake: error: no checkpoint at {tmp_path}/a\\n\\x1b[31mb.pth\n")


INTERRUPTED_INSIDE = """
from masklake.jobs import cli, commands
from masklake.model.errors import MaskLakeError

class Interrupts:
    def __set_name__(self, owner, name):
        raise KeyboardInterrupt

class Lost(MaskLakeError):
    exit_code = 77

@commands.app.command("label")
def wrapped():
    class Made:
        attribute = Interrupts()

@commands.app.command("query")
def cleaned_up():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise Lost("while it cleaned up")

@commands.app.command()
def another_reason():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise Lost("the lease") from None

cli.main()
"""


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("label", "Run the same command again to continue."),
        ("query", "The table is as it was, and no file was written."),
    ],
)
def test_ctrl_c_is_one_line_wherever_it_strikes_that_fits_the_command(command: str, line: str) -> None:
    done = run(command, code=INTERRUPTED_INSIDE)
    assert done.returncode == 130
    assert done.stderr == f"masklake: interrupted. {line}\n"


def test_each_command_says_what_a_stop_leaves() -> None:
    assert set(AFTER_A_STOP) == COMMANDS
    assert stopped_line("convert", "stopped by SIGTERM") == "masklake: stopped by SIGTERM. Nothing was written.\n"
    assert stopped_line(None) == "masklake: interrupted.\n"
    assert command_of(["--version", "show", "table"]) == "show"


def test_an_interrupt_that_an_error_replaces_is_that_error() -> None:
    done = run("another-reason", code=INTERRUPTED_INSIDE)
    assert (done.returncode, done.stderr) == (77, "masklake: error: the lease\n")


STRAY = """
from masklake.jobs import cli, commands

@commands.app.command("query")
def named():
    open({path!r})

@commands.app.command("show")
def nameless():
    raise ConnectionResetError(104, "Connection reset by peer")

cli.main()
"""


def test_an_error_of_the_file_system_that_no_command_foresaw_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("query", code=STRAY.format(path=str(tmp_path / "file" / "below")))
    assert (done.returncode, done.stdout) == (20, "")
    assert done.stderr == (
        f"masklake: error: {tmp_path}/file/below: is a file where a folder is needed, or lies below one; check the path\n"
    )


def test_an_error_that_may_be_a_fault_of_ours_keeps_its_traceback() -> None:
    done = run("show", code=STRAY.format(path=""))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_an_output_that_is_full_is_a_line() -> None:
    code = "from masklake.jobs.cli import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code, "--version"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 24
    assert done.stderr == (
        "masklake: error: standard output or a temporary file (TMPDIR): no space left on the disk; "
        "free some space and start the same command again\n"
    )


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("convert").returncode == 2


def test_version() -> None:
    assert run("--version").stdout.startswith("masklake ")


def leaves(group: Any = None, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """The commands that do something, also those of groups, by name: `label`, `runs drop`."""
    found: dict[str, Any] = {}
    for name, command in (group or get_command(app)).commands.items():
        full = (*names, name)
        found |= leaves(command, full) if hasattr(command, "commands") else {" ".join(full): command}
    return found


@pytest.mark.parametrize("command", sorted(leaves()))
def test_every_command_prints_json_on_request(command: str) -> None:
    assert "--json" in {name for parameter in leaves()[command].params for name in parameter.opts}


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    class Report(BaseModel):
        scores: dict[str, Any]

    print_json(Report(scores={"ap": math.nan, "by_max_dets": {100: math.inf}}))
    assert json.loads(capsys.readouterr().out) == {"scores": {"ap": None, "by_max_dets": {"100": None}}}


def numbers(kind: type) -> list[tuple[str, str]]:
    """Each command's options of this type, by name; a test over them sees every new one."""
    found = []
    for name, command in leaves().items():
        hints = get_type_hints(inspect.unwrap(command.callback, stop=lambda function: hasattr(function, "__signature__")))
        parameters = [parameter for parameter in command.params if parameter.name in hints]
        found += [(name, p.opts[0]) for p in parameters if kind.__name__ in re.findall(r"\w+", str(hints[p.name]))]
    return found


def test_the_options_that_are_numbers_are_found() -> None:
    assert {
        ("label", "--max-failed"),
        ("train", "--learning-rate"),
        ("evaluate", "--iou-score"),
        ("runs vacuum", "--older-than"),
    } <= set(numbers(float))
    assert {("label", "--workers"), ("evaluate", "--max-dets"), ("demo", "--epochs")} <= set(numbers(int))


@pytest.mark.parametrize(
    ("command", "option", "value", "allowed"),
    [
        *((*option, value, "number") for option in numbers(float) for value in ("nan", "inf", "-inf", "1e400", "many", "")),
        *((*option, value, "a whole number") for option in numbers(int) for value in ("nan", "inf", "1.5", "-1", "many")),
    ],
)
def test_a_wrong_number_names_its_option_and_what_is_allowed(
    command: str, option: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["masklake", *command.split(), f"{option}={value}"])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (2, 1)
    assert err.startswith(f"masklake: error: {command}: invalid value for '{option}': ")
    given, _, advice = err.partition("; give ")
    assert allowed in advice
    assert "put should" not in given, "a validator's words"
    assert advice.count("give") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["query", "t", "SELECT", "a", "FROM", "b"],
            "query: got unexpected extra arguments (a FROM b). SQL is one argument: put",
        ),
        (["query", "t", "SELECT", "-1"], "put it in quotes"),
        (["query", "t"], "missing argument 'SQL': DuckDB SQL in quotes"),
        (["label", "a.jpg", "b.jpg", "c.jpg", "t", "--weights", "w"], "label 'photos/*.jpg' TABLE"),
        (["label", "a", "t"], "missing option '--weights': A"),
        (["show", "t", "a.jpg", "b.jpg", "-o", "x.png"], "argument (b.jpg). It draws one image at a time. See masklake show -"),
        (["train", "--epochs", "many"], "train: invalid value for '--epochs'"),
        (["label", "a", "t", "--weights", "w", "--max-failed", "nan"], "give a number from 0 to 1. See"),
        (["convert", "a", "b", "--preset", "tiny", "--norm-eps", "inf"], "'--norm-eps': inf is not a finite number"),
        (["train", "--learn", "joined"], "invalid value for '--learn': 'joined' is not one of 'joint', 'rpn',"),
        (["train", "--learning-rate", "0"], "invalid value for '--learning-rate': 0.0; give a finite number above 0. See"),
        (["evaluate", "t", "--truth", "x", "--iou-score", "-0.1"], "invalid value for '--iou-score'"),
        (["label", "a", "t", "--weights", "w", "--max-pixels", "1" * 20], "invalid value for '--max-pixels'"),
        (
            ["runs", "drop", "labels"],
            "runs drop: missing argument 'RUN': ID of a committed run, as `masklake runs TABLE` shows",
        ),
        (["runs", "labels", "more"], "runs list: got unexpected extra argument (more). See masklake runs list --help"),
        (["runs", "labels", "--jsn"], "runs list: no such option: --jsn"),
        (["runs", "vacuum", "t", "--older-than", "nan"], "runs vacuum: invalid value for '--older-than'"),
        (["quer"], "masklake: error: no such command 'quer'. Did you mean 'query'? See masklake --help\n"),
    ],
)
def test_wrong_usage_is_a_line_with_the_usual_cause(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["masklake", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (2, 1)
    assert said in err


@pytest.mark.parametrize("tasks", ["boxes", "", "box,"])
def test_a_task_that_is_none_is_told_with_its_option(masklake: Any, tasks: str) -> None:
    for arguments in (("label", "x", "T", "--weights", "w"), ("train", "t.json", "-o", "o", "--name", "n")):
        code, _, err = masklake(*arguments, "--tasks", tasks)
        assert code == 12
        assert f"--tasks {tasks!r}: " in err
        assert "give box, mask, keypoint" in err
