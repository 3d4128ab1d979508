"""Errors of inputs, tables, runs and clusters; the tree's root and its rules are in ``model.errors``.

MaskLakeError
├── InputNotFoundError            20   no such folder, bucket, manifest or image
├── EmptyInputError               21   the input exists and holds no image
├── AccessDeniedError             22   the storage refuses these credentials
├── AnnotationError               23   a COCO file that cannot be used as it is
├── StorageError                  24   the storage cannot be reached, or breaks the protocol
├── TableError                    30   the path holds no MaskLake table, or one this version cannot use
├── LeaseHeldError                31   another driver is writing this run
├── LeaseLostError                32   this driver's lease was taken over; it stopped without committing
├── QueryError                    33   SQL that DuckDB refuses
├── RunNotFoundError              34   the table does not hold this run
├── ClusterTooSmallError          40   the plan needs more CPUs, GPUs or memory than the cluster has
├── TooManyFailuresError          41   more images failed than --max-failed allows (the table is committed)
├── TrainingError                 42   training stopped: diverged, or workers kept failing
├── LabellingError                43   Ray gave up a labelling run
├── ClusterUnusableError          44   no Ray cluster answers there, or this process cannot join it
└── ClusterLostError              45   the Ray cluster was lost during the run
"""

from __future__ import annotations

from masklake.model.errors import MaskLakeError


class InputNotFoundError(MaskLakeError):
    """No such folder, bucket, manifest or image."""

    exit_code = 20


class EmptyInputError(MaskLakeError):
    """The input exists and holds no image to work on."""

    exit_code = 21


class AccessDeniedError(MaskLakeError):
    """The storage refuses these credentials."""

    exit_code = 22


class AnnotationError(MaskLakeError):
    """A COCO file that cannot be used as it is."""

    exit_code = 23


class StorageError(MaskLakeError):
    """The storage cannot be reached, or its answer does not follow the protocol.

    may_pass: whether the same request may succeed later, because the store was busy or out of reach, or its reply was lost.
    """

    exit_code = 24
    may_pass: bool = False


class TableError(MaskLakeError):
    """The path holds no MaskLake table, or one that this version cannot use."""

    exit_code = 30


class LeaseHeldError(MaskLakeError):
    """Another driver is writing this run; the message names its holder and the age of the lease."""

    exit_code = 31
    run_id = ""
    """Name of the lease."""


class LeaseLostError(MaskLakeError):
    """This driver's lease was taken over; it stopped without committing."""

    exit_code = 32


class QueryError(MaskLakeError):
    """SQL that DuckDB refuses."""

    exit_code = 33


class RunNotFoundError(MaskLakeError):
    """The table does not hold this run: it never existed, is not committed, or was dropped."""

    exit_code = 34


class ClusterTooSmallError(MaskLakeError):
    """The plan needs more CPUs, GPUs or memory than the cluster has."""

    exit_code = 40


class TooManyFailuresError(MaskLakeError):
    """More images failed than ``--max-failed`` allows; the table is committed all the same."""

    exit_code = 41


class TrainingError(MaskLakeError):
    """Training stopped: the loss diverged, or workers kept failing."""

    exit_code = 42


class LabellingError(MaskLakeError):
    """Ray gave up a labelling run: its cluster was lost, or more blocks were lost than allowed."""

    exit_code = 43


class ClusterUnusableError(MaskLakeError):
    """No Ray cluster answers at the address, or this process cannot join it: no node here, another version, a wrong token."""

    exit_code = 44


class ClusterLostError(MaskLakeError):
    """The Ray cluster's head or this host's node was lost during the run; finished work is kept."""

    exit_code = 45
