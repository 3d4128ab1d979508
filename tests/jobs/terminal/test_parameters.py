"""Parameters of the command line, declared from the fields of the options."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

import pytest
import typer
from pydantic import BaseModel, ValidationError
from typer.main import get_command
from typer.testing import CliRunner

from masklake.jobs.commands import app
from masklake.jobs.label import LabelOptions
from masklake.jobs.propose import ProposeOptions
from masklake.jobs.terminal.help import examples, paragraphs
from masklake.jobs.terminal.parameters import PANELS, Values, takes
from masklake.jobs.training.options import TrainOptions
from masklake.model.config import PredictOptions
from masklake.model.errors import ConfigError
from masklake.model.fields import Group, Option
from masklake.pipeline.training.recipe import Recipe

COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True, eq=False)
class Inner:
    """Options that others hold."""

    size: Annotated[int, Option("Size.", gt=1, le=9, panel="Input")] = 3
    hidden: Annotated[int, Option("No option of the command line.")] = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Rates:
    """Options that a mapping changes."""

    rate: Annotated[float, Option("Rate.", gt=0, panel="Training")] = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Fields:
    """Options of each kind."""

    source: Annotated[str, Option("Source.", argument=True)]
    kinds: Annotated[frozenset[Literal["cat", "dog"]] | None, Option("Kinds.", default="all", panel="Model")] = None
    counts: Annotated[tuple[int, ...], Option("Counts.", ge=1, panel="Run")] = (1, 2)
    loud: Annotated[bool, Option("Loud.", panel="Run", name="noise")] = False
    inner: Inner = Inner(size=4)
    rates: Annotated[dict[str, float] | None, Group(Rates, "the file's")] = None


def given(*arguments: str, own_defaults: bool = True) -> tuple[Values, Any]:
    """What a command with these fields and a parameter of its own is called with."""
    calls: list[tuple[Values, Any]] = []

    def command(values: Values, share: Annotated[float, Option("Share.", ge=0, le=1, panel="Run")] = 0.25) -> None:
        calls.append((values, share))

    command.__annotations__ = get_type_hints(command, localns=globals(), include_extras=True)
    program = typer.Typer(rich_markup_mode=None)
    program.command()(takes(Fields, own_defaults)(command))
    done = CliRunner().invoke(program, arguments)
    if done.exit_code:
        raise done.exception if isinstance(done.exception, ConfigError) else AssertionError(done.output)
    return calls[0]


def test_values_come_nested_with_the_defaults_of_the_fields() -> None:
    assert given("a") == ({"source": "a", "counts": [1, 2], "inner": {"size": 4}}, 0.25)
    values, share = given("a", "--kinds", "dog, cat", "--counts", "7", "--noise", "--size=9", "--rate=1e-3", "--share=1")
    assert values == {
        "source": "a",
        "kinds": ["dog", "cat"],
        "counts": [7],
        "loud": True,
        "inner": {"size": 9},
        "rates": {"rate": 0.001},
    }
    assert share == 1


def test_what_a_file_may_give_is_left_out() -> None:
    assert given(own_defaults=False) == ({}, 0.25)
    assert given("--size", "4", own_defaults=False)[0] == {"inner": {"size": 4}}


@pytest.mark.parametrize("wrong", ["--size=1", "--size=10", "--counts=0", "--rate=0", "--rate=nan", "--share=2", "--hidden=1"])
def test_a_value_out_of_range_is_wrong_usage(wrong: str) -> None:
    with pytest.raises(AssertionError, match="Usage"):
        given("a", wrong)


def test_a_name_that_is_not_known_is_told_with_its_option() -> None:
    with pytest.raises(ConfigError, match=r"^--kinds 'dog,cow': unknown kind 'cow'; give cat, dog, separated by commas$"):
        given("a", "--kinds", "dog,cow")


# -- the fields in pydantic --------------------------------------------------------------------------------------------


def test_models_check_the_ranges_of_their_fields() -> None:
    assert LabelOptions.model_validate({"input": {"uri": "a"}, "table": "t", "weights": "w"}).predict == PredictOptions(
        precision="auto"
    )
    for wrong, message in (
        ({"score_threshold": 1.5}, "less than or equal to 1"),
        ({"batch_size": 0}, "greater than 0"),
        ({"max_detections": 1001}, "less than or equal to 1000"),
        ({"tasks": []}, "at least 1 item"),
    ):
        with pytest.raises(ValidationError, match=message):
            PredictOptions.model_validate(wrong)
    with pytest.raises(ValidationError, match="less than 1"):
        Recipe(milestones=(0.5, 1.0))


@pytest.mark.parametrize("model", [LabelOptions, ProposeOptions, TrainOptions, PredictOptions, Recipe])
def test_every_field_of_the_options_has_its_words(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        described = [data.help for data in field.metadata if isinstance(data, Option)]
        assert nested or name in ("recipe", "model") or (len(described) == 1 and described[0].endswith(".")), name


# -- the help pages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_text_is_a_sentence_in_a_known_panel(name: str) -> None:
    for parameter in COMMANDS[name].params:
        assert parameter.help[0].isupper() or parameter.help[0] in "`*", parameter.name
        assert parameter.help.endswith("."), parameter.name
        assert parameter.rich_help_panel in PANELS or parameter.param_type_name == "argument"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_two_examples_that_it_understands(name: str) -> None:
    lines = COMMANDS[name].epilog.replace(r"\[", "[").splitlines()
    assert (lines[0], len(lines)) == ("Examples:", 3)
    for line in lines[1:]:
        program, command, *arguments = shlex.split(line)
        assert (program, command, len(line.strip()) <= 78) == ("masklake", name, True)
        COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize("name", COMMANDS["runs"].commands)
def test_each_command_of_a_group_has_such_help_too(name: str) -> None:
    command = COMMANDS["runs"].commands[name]
    assert all(parameter.help.endswith(".") for parameter in command.params)
    lines = command.epilog.splitlines()
    assert len(lines) == 3
    for line in lines[1:]:
        program, group, first, *arguments = shlex.split(line)
        assert (program, group, len(line.strip()) <= 78) == ("masklake", "runs", True)
        assert first in (name, "labels"), "a list needs no name"
        command.make_context(name, arguments if first == name else [first, *arguments])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["t"], ["list", "t"]),
        (["t", "--json"], ["list", "t", "--json"]),
        (["--json", "t"], ["list", "--json", "t"]),
        (["drop", "t", "r"], ["drop", "t", "r"]),
        (["t", "drop", "r"], ["drop", "t", "r"]),
        (["s3://b/t", "vacuum", "--dry-run"], ["vacuum", "s3://b/t", "--dry-run"]),
        (["./drop"], ["list", "./drop"]),
        (["list", "drop"], ["list", "drop"]),
    ],
)
def test_a_list_of_runs_is_meant_where_no_command_is_named(given: list[str], meant: list[str]) -> None:
    context = COMMANDS["runs"].make_context("runs", list(given))
    assert [*context._protected_args, *context.args] == meant


def test_the_commands_stand_in_the_order_of_the_work() -> None:
    assert list(COMMANDS) == ["demo", "train", "convert", "propose", "label", "query", "show", "evaluate", "runs"]


def test_a_paragraph_is_one_line_and_an_example_is_no_markup() -> None:
    assert paragraphs("One.\n\n    Two\n    three.\n    ") == "One.\n\nTwo three."
    assert examples("masklake query t 'SELECT a[1]'") == "Examples:\n  masklake query t 'SELECT a\\[1]'"
