"""A process that stands by from the start of the command and labels a run of a few images without Ray.

Starting Ray takes longer than labelling a few images. The process is forked as soon as the code is imported, while no thread
of a library runs yet, and loads the model while the run is planned. If it ends before it answers, because of an image or for
another reason, the images go to Ray's workers (`jobs.labelling.lost_images`), which find out which image it was.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple, NoReturn

import pyarrow as pa
import torch

from masklake.model.detector import Detector, load_detector
from masklake.pipeline.labelling.labeller import Labeller, LabelSpec, labelled_and_written
from masklake.pipeline.labelling.run_output import Finished, failed, reported
from masklake.pipeline.table.table import Table

OnProgress = Callable[[int, int], None]


class Task(NamedTuple):
    """What the process is to label. rows: MANIFEST_SCHEMA."""

    spec: LabelSpec
    table: Table
    run_id: str
    rows: pa.Table


class Standby:
    """Handle of the process."""

    def __init__(self, connection: Connection, pid: int) -> None:
        self._connection = connection
        self._pid: int | None = pid

    def load(self, checkpoint: bytes, device: str) -> None:
        """Lets the process load the model that it will use. Returns at once."""
        with suppress(OSError):  # if it has ended, `label` says so
            self._connection.send((checkpoint, device))

    def label(self, task: Task, on_progress: OnProgress) -> list[Finished] | None:
        """Labels and writes the rows as one block; returns it, or None if the process ended without an answer.

        Calls `on_progress(images, failed)` with the numbers of images that were finished. Raises the error of a block that
        could not be labelled or written.
        """
        try:
            self._connection.send(task)
            while isinstance(answer := self._connection.recv(), tuple):
                on_progress(*answer)
        except (EOFError, OSError):
            return None
        return reported(answer)

    def close(self) -> None:
        """Ends the process. May be called more than once."""
        if self._pid is not None:
            self._connection.close()
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = None


@contextmanager
def started() -> Iterator[Standby | None]:
    """Context manager for a process that stands by. It yields None where a fork is not safe: on systems other than Linux, or if
    this process has used CUDA.
    """
    if sys.platform != "linux" or torch.cuda.is_initialized():
        yield None
        return
    ours, theirs = Pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _serve(theirs)
    theirs.close()
    standby = Standby(ours, pid)
    try:
        yield standby
    finally:
        standby.close()


def _serve(connection: Connection) -> NoReturn:
    """Runs in the process: loads a model, labels one task, and ends. Nothing of the parent's clean-up may run here."""
    try:
        _hide_output()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which ends this process
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        model = _loaded(*connection.recv())
        task: Task = connection.recv()
        threading.Thread(target=_end_with_the_parent, args=(connection,), daemon=True).start()
        connection.send(_answer(model, task, lambda images, failures: connection.send((images, failures))))
    except (EOFError, BrokenPipeError):
        pass  # the parent has no task, or has ended
    finally:
        os._exit(0)


def _hide_output() -> None:
    """Sends what libraries print and log to /dev/null: the terminal is the parent's."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())


def _loaded(checkpoint: bytes, device: str) -> Detector | Exception:
    try:
        return load_detector(checkpoint, device=device)
    except Exception as error:  # noqa: BLE001 - it is the answer to the task
        return error


def _answer(model: Detector | Exception, task: Task, on_progress: OnProgress) -> pa.Table:
    """Returns REPORT_SCHEMA."""
    if isinstance(model, Exception):
        return failed(model)
    torch.set_num_threads(task.spec.torch_threads)
    return labelled_and_written(Labeller(task.spec, model, on_progress), task.rows, task.table, task.run_id)


def _end_with_the_parent(connection: Connection) -> NoReturn:
    with suppress(EOFError, OSError):
        connection.recv()
    os._exit(1)
