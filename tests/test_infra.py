"""The manifests in infra/: valid YAML, versions as locked, and commands that the command line accepts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from masklake.jobs.commands import app
from masklake.jobs.terminal.signals import GRACE_S

ROOT = Path(__file__).resolve().parents[1]


def documents(path: Path) -> Iterator[dict[str, Any]]:
    """The file's documents, and those that a ConfigMap carries as text."""
    for document in yaml.safe_load_all(path.read_text()):
        yield document
        for text in (document.get("data") or {}).values():
            yield from yaml.safe_load_all(text)


def ray_jobs() -> list[dict[str, Any]]:
    return [job for path in sorted((ROOT / "infra").glob("*.yaml")) for job in documents(path) if job["kind"] == "RayJob"]


def commands_of(text: str) -> list[list[str]]:
    """The `masklake` commands in the code blocks of a page, continuation lines joined, without redirections and pipes."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [re.split(r" [<>|] ", line)[0] for line in lines if re.match(r"\s*masklake [a-z]+ ", line)]
    return [shlex.split(command)[1:] for command in commands]


def parse(arguments: list[str]) -> None:
    """Parse without running: an unknown option, a missing argument or a bad value raises."""
    root = typer.main.get_command(app)
    name, *rest = arguments
    command = root.get_command(root.make_context("masklake", [name, *rest], resilient_parsing=True), name)
    assert command is not None, f"no command {name}"
    command.make_context(name, rest)


@pytest.mark.parametrize("job", ray_jobs(), ids=lambda job: job["metadata"]["generateName"])
def test_a_ray_job_runs_a_command_that_parses_on_the_locked_ray(job: dict[str, Any]) -> None:
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "masklake"
    parse(arguments)
    lock = (ROOT / "requirements.lock").read_text()
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}" in lock


@pytest.mark.parametrize("job", ray_jobs(), ids=lambda job: job["metadata"]["generateName"])
def test_a_stopped_job_has_time_to_end(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group in (head, *workers):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > GRACE_S
    (container,) = head["template"]["spec"]["containers"]
    limits = {variable["name"]: variable["value"] for variable in container["env"]}
    assert float(limits["RAY_JOB_STOP_WAIT_TIME_S"]) > GRACE_S


def test_there_is_a_job_for_training_and_one_for_labelling() -> None:
    assert {shlex.split(job["spec"]["entrypoint"])[1] for job in ray_jobs()} == {"train", "label"}


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")),
        *(str(p.relative_to(ROOT)) for p in (ROOT / "examples").glob("*.md")),
    ],
)
def test_every_command_in_the_documentation_parses(page: str) -> None:
    for arguments in commands_of((ROOT / page).read_text()):
        if arguments not in ([], ["..."]):
            parse(arguments)


def test_the_image_has_the_compiler_that_a_gpu_needs() -> None:
    """Triton builds launchers when kernels first run; without a compiler each image on a GPU would be a model_error."""
    (install,) = re.findall(r"^RUN apt-get .*install (.*?)&&", (ROOT / "infra/Dockerfile").read_text(), re.MULTILINE)
    assert {"gcc", "libc6-dev"} <= set(install.split())
