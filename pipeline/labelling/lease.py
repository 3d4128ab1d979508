"""The lease of a run, `_masklake/<run_id>/lease`: one writer per run (design, section 3.3).

Two drivers on one run would each write every row. In an object store the lease is an object that is created and renewed by
conditional puts, so the store itself refuses one of the two drivers. On a local file system it is a lock of the operating
system, which the kernel releases when the driver dies.

If the reply to a put is lost, the object is read, so that our own put is never mistaken for another driver's
(`pipeline.storage.conditional`).

An expired lease is taken over. The lease of a holder on this host whose process has ended is expired at once. Of a holder on
another host only the last renewal is known, and the clocks of hosts differ, so the lease is watched for its whole lifetime on
this host's clock.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from masklake.model.errors import MaskLakeError
from masklake.pipeline.errors import LeaseHeldError, LeaseLostError, StorageError
from masklake.pipeline.storage.conditional import ConditionalObject, RefusedError, bare_tags
from masklake.pipeline.storage.errors import reason_of, translated
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import parse_uri

if TYPE_CHECKING:  # defined in obstore's stubs only
    from obstore import UpdateVersion

logger = logging.getLogger(__name__)

TTL_S = 30.0
"""Seconds after which a lease expires without renewal. A driver renews it three times in that time."""

UPKEEP = "runs.upkeep"
"""Name of the lease that a process takes to drop runs or delete files. It is not a valid run id."""

OnWait = Callable[[str], None]

_HELD_HERE: set[str] = set()  # tokens of the leases in objects that this process holds or is about to take


@dataclass(frozen=True)
class Holder:
    """The holder of a lease, as its content stores it.

    host: name, boot id and process namespace, so that equal pids in two containers are distinguished. pid_started: start tick
    of the process, which distinguishes a later process with the same pid. token: unique to the lease. acquired_at, renewed_at:
    ISO 8601, UTC. ttl_s: seconds from a renewal to the expiry. released: whether the holder has released the lease.
    """

    host: str
    pid: int
    pid_started: str
    token: str
    acquired_at: str
    renewed_at: str
    ttl_s: float
    released: bool = False

    @classmethod
    def this_process(cls, ttl_s: float) -> Holder:
        """Returns a new holder for the calling process."""
        now = _now()
        pid = os.getpid()
        return cls(_this_host(), pid, _start_tick(pid) or "", uuid.uuid4().hex, now, now, ttl_s)

    @classmethod
    def from_json(cls, data: bytes, uri: str) -> Holder:
        """Returns the holder in the content of a lease. Raises StorageError if it is not one."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise StorageError(f"{uri}: not a lease ({error}); remove it if no driver of this run lives") from error

    def to_json(self) -> bytes:
        """Returns the content of the lease."""
        return json.dumps(asdict(self), indent=1).encode()

    @property
    def is_gone(self) -> bool:
        """Whether this holder certainly writes no more: it released the lease, or its process on this host has ended."""
        if self.released:
            return True
        if not self.is_here:
            return False
        if (self.pid, self.pid_started) == (os.getpid(), _start_tick(os.getpid()) or ""):
            return self.token not in _HELD_HERE
        return not _lives(self.pid, self.pid_started)

    @property
    def is_here(self) -> bool:
        """Whether it is a process on this host: then the operating system knows whether it lives."""
        return self.host == _this_host()

    def __str__(self) -> str:
        age = (datetime.now(UTC) - datetime.fromisoformat(self.acquired_at)).total_seconds()
        return f"{self.host.split('/')[0]} (process {self.pid}), for {max(age, 0):.0f} s"


class Lease(ABC):
    """The exclusive right to write one run. As a context manager, it releases the lease at the end."""

    def __init__(self, uri: str, run_id: str, ttl_s: float) -> None:
        self.uri = uri
        self.run_id = run_id
        self.ttl_s = ttl_s

    @staticmethod
    def acquire(storage: Storage, table_uri: str, run_id: str, ttl_s: float = TTL_S, on_wait: OnWait | None = None) -> Lease:
        """Returns the lease of a run. Raises LeaseHeldError, which names the holder, if another driver has it.

        on_wait: called with a line if the lease of a holder on another host has to be watched until it expires.
        """
        uri = storage.join(table_uri, "_masklake", run_id, "lease")
        if parse_uri(uri).is_local:
            return FileLease(uri, run_id, ttl_s)
        return ObjectLease(storage, uri, run_id, ttl_s, on_wait or logger.warning)

    @abstractmethod
    def check(self) -> None:
        """Raises LeaseLostError if the lease is known to be lost or too old. Sends no request, so it may be called often."""

    @abstractmethod
    def confirm(self) -> None:
        """Same as `check`, but also asks the storage; call it right before a commit. Raises StorageError if the storage does
        not answer.
        """

    @abstractmethod
    def release(self) -> None:
        """Releases the lease; does nothing if it is already lost."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _held_by(self, holder: Holder | str) -> LeaseHeldError:
        what = "the runs of this table are being changed" if self.run_id == UPKEEP else f"run {self.run_id} is being written"
        error = LeaseHeldError(f"{what} by {holder}; wait until it ends, or stop it and start again ({self.uri})")
        error.run_id = self.run_id
        return error

    def _lost(self, reason: str) -> LeaseLostError:
        return LeaseLostError(
            f"the lease of run {self.run_id} is lost: {reason}; nothing was committed, start again ({self.uri})"
        )


class FileLease(Lease):
    """A lock of the operating system on a local file. It ends with the process and needs no renewal."""

    def __init__(self, uri: str, run_id: str, ttl_s: float) -> None:
        super().__init__(uri, run_id, ttl_s)
        self._path = Path(parse_uri(uri).key)
        with translated(uri):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
            try:
                self._lock()
                self._write(Holder.this_process(self.ttl_s).to_json())
            except BaseException:
                self._file.close()  # an open file would hold the lock until this process ends
                raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            content = self._path.read_bytes()
            # The holder writes its name right after it locks the file, which may be empty until then.
            raise self._held_by(Holder.from_json(content, self.uri) if content else "another process") from None

    def _write(self, content: bytes) -> None:
        self._file.truncate(0)
        self._file.write(content)
        self._file.flush()

    def check(self) -> None:
        """Raises LeaseLostError if the lock's file was removed or replaced: another driver may have locked the new one."""
        if self._file.closed:
            raise self._lost("it was released")
        try:
            same = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise self._lost("its file was removed")

    def confirm(self) -> None:
        """Same as `check`, which already asks the operating system."""
        self.check()

    def release(self) -> None:
        """Releases the lock. The file is kept: removing it would let two waiting drivers lock two different files."""
        if self._file.closed:
            return
        try:
            with self._file:
                self._write(b"")
        except OSError as error:  # the file is closed nevertheless, and the lock counts, not the content
            logger.warning("%s: still names this process, which has released the lease (%s)", self.uri, reason_of(error))


class ObjectLease(Lease):
    """An object held by conditional puts, which a thread renews three times per lifetime."""

    def __init__(self, storage: Storage, uri: str, run_id: str, ttl_s: float, on_wait: OnWait) -> None:
        super().__init__(uri, run_id, ttl_s)
        self._on_wait = on_wait
        self._holder = Holder.this_process(ttl_s)
        self._lock = threading.Lock()  # a renewal and a confirmation must not use the same version
        self._stop = threading.Event()
        self._reason: str | None = None  # why the lease is lost
        self._trouble: MaskLakeError | None = None  # why the last renewal failed
        _HELD_HERE.add(self._holder.token)
        try:
            bare = bare_tags(storage, uri.rpartition("/")[0])
            self._object = ConditionalObject(_impatient(storage, ttl_s), uri, self._holder.token, bare)
            with translated(uri):
                self._version, self._renewed = self._take()
        except BaseException:
            _HELD_HERE.discard(self._holder.token)  # if the put arrives after all, this process may take the lease over
            raise
        self._thread = threading.Thread(target=self._keep_renewing, name=f"lease-{run_id}", daemon=True)
        self._thread.start()

    def _take(self) -> tuple[UpdateVersion, float]:
        """Returns the version of our lease object, and the time before the request: other drivers count its lifetime from a
        later time, so ours ends first.
        """
        started = time.monotonic()
        try:
            return self._object.create(self._holder.to_json()), started
        except RefusedError as error:
            return self._take_over(error)

    def _take_over(self, refused: RefusedError) -> tuple[UpdateVersion, float]:
        if refused.found is None:
            raise StorageError(f"{self.uri}: could neither be created nor read; is it being removed?") from refused
        holder = Holder.from_json(refused.found.content, self.uri)
        if not holder.is_gone:
            self._watch_until_expired(holder, refused.found.version)
        started = time.monotonic()
        try:
            version = self._object.replace(self._holder.to_json(), refused.found.version)
        except RefusedError as error:
            raise self._held_by(self._named(error)) from None
        logger.info("took over the lease of run %s from %s", self.run_id, holder)
        return version, started

    def _named(self, refused: RefusedError) -> Holder | str:
        return Holder.from_json(refused.found.content, self.uri) if refused.found else "another driver"

    def _watch_until_expired(self, holder: Holder, version: UpdateVersion) -> None:
        """Returns after the lease was not renewed for its whole lifetime. Raises LeaseHeldError as soon as it is renewed, and
        at once for a holder on this host.
        """
        if holder.is_here:
            raise self._held_by(holder)
        self._on_wait(
            f"run {self.run_id} is leased to {holder}; if it does not renew within {holder.ttl_s:.0f} s, this driver takes over"
        )
        deadline = time.monotonic() + holder.ttl_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, holder.ttl_s / 10))
            now = self._object.read()
            # Even if it was just released: its run may be complete, so this driver must plan again.
            if now is None or now.version != version:
                raise self._held_by(Holder.from_json(now.content, self.uri) if now else holder)

    def _keep_renewing(self) -> None:
        """Renews the lease until it is released or lost; runs in a thread."""
        while not self._stop.wait(self.ttl_s / 3):
            try:
                self._renew()
            except MaskLakeError as error:
                self._trouble = error
                logger.warning("the lease of run %s could not be renewed: %s", self.run_id, error)
            if self._reason:
                return

    def _renew(self) -> None:
        """Renews the lease; records the reason if its object was replaced or removed. Raises the storage's errors."""
        with self._lock, translated(self.uri):
            started = time.monotonic()  # before the put: others count the lifetime from its arrival, so ours ends first
            self._holder = replace(self._holder, renewed_at=_now())
            try:
                self._version = self._object.replace(self._holder.to_json(), self._version)
            except RefusedError as error:
                self._reason = self._why_refused(error)
            else:
                self._renewed, self._trouble = started, None

    def _why_refused(self, refused: RefusedError) -> str:
        if refused.found is None:
            return "its object was removed"
        holder = self._named(refused)
        if isinstance(holder, Holder) and holder.token == self._holder.token:
            return "the store refused to replace it under its own entity tag (If-Match)"
        return f"{holder} took it over"

    def check(self) -> None:
        """Raises LeaseLostError if a renewal was refused, or none succeeded within the lease's lifetime."""
        if self._reason:
            raise self._lost(self._reason)
        if (silent := time.monotonic() - self._renewed) > self.ttl_s:
            why = f" ({self._trouble})" if self._trouble else ""
            raise self._lost(f"it could not be renewed for {silent:.0f} s{why}")

    def confirm(self) -> None:
        """Same as `check`, but also renews the lease."""
        self.check()
        self._renew()
        self.check()

    def release(self) -> None:
        """Marks the lease as released, unless another driver has taken it over."""
        self._stop.set()
        self._thread.join()
        _HELD_HERE.discard(self._holder.token)
        if self._reason:
            return
        self._reason = "it was released"
        content = replace(self._holder, released=True, renewed_at=_now()).to_json()
        try:
            with translated(self.uri):
                self._object.replace(content, self._version)
        except RefusedError:
            return  # it has expired, and another driver has taken it over
        except MaskLakeError as error:
            logger.warning("the lease of run %s could not be released, and will expire: %s", self.run_id, error)


def _impatient(storage: Storage, ttl_s: float) -> Storage:
    """Returns the same storage with a request timeout well below the lifetime: one lost request must not cost the lease."""
    limit = min(storage.options.request_timeout_s, max(ttl_s / 6, 1.0))
    return Storage(storage.options.model_copy(update={"request_timeout_s": limit}))


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _this_host() -> str:
    """Returns host name, boot id and process namespace; the latter two if the system has them (Linux)."""
    parts = [socket.gethostname()]
    if os.path.exists("/proc/self/ns/pid"):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "/".join(parts)


def _start_tick(pid: int) -> str | None:
    """Returns when a process started, as the kernel's tick count; None if there is no such process or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]  # field 22; the name in field 2 may contain spaces and brackets


def _lives(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is alive and belongs to another user
    tick = _start_tick(pid)
    return tick is None or not started or tick == started
