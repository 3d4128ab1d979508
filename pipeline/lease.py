"""One writer a run: the lease `_masklake/<run_id>/lease` (design, section 3.3).

Two drivers on one run would each write every row; Ray Data's checkpoint protects sequential restarts only. In an object store
the lease is an object created and renewed by conditional puts, so that of two drivers one is refused by the store itself. On a
local file system it is a lock of the operating system, which the kernel drops when the driver dies.

An expired lease is taken over. A holder on this host whose process is gone counts as expired at once; of a holder elsewhere
we only know its last renewal, and clocks differ between hosts, so we watch the lease for its whole lifetime on our own clock.
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
from typing import Self

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from pipeline.errors import LeaseHeldError, LeaseLostError, StorageError
from pipeline.storage import Storage, describe, parse, translated

logger = logging.getLogger(__name__)

TTL_S = 30.0
"""Seconds a lease lives without renewal; a driver renews it three times in that time."""

OnWait = Callable[[str], None]


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. host: name, boot and process namespace, so that equal pids in two containers stay apart."""

    host: str
    pid: int
    pid_started: str  # the kernel's start tick: a later process of the same pid is another one
    token: str
    acquired_at: str
    renewed_at: str
    ttl_s: float
    released: bool = False

    @classmethod
    def this_process(cls, ttl_s: float) -> Holder:
        """A new holder that names the calling process."""
        now = _now()
        pid = os.getpid()
        return cls(_this_host(), pid, _start_tick(pid) or "", uuid.uuid4().hex, now, now, ttl_s)

    @classmethod
    def from_json(cls, data: bytes, uri: str) -> Holder:
        """Read a lease's content; StorageError when it is not one."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise StorageError(f"{uri}: not a lease ({error}); remove it if no driver of this run lives") from error

    def to_json(self) -> bytes:
        """The lease's content."""
        return json.dumps(asdict(self), indent=1).encode()

    @property
    def is_gone(self) -> bool:
        """Whether this holder surely does not write any more: it said so, or its process on this host ended."""
        if self.released:
            return True
        return self.host == _this_host() and not _lives(self.pid, self.pid_started)

    def __str__(self) -> str:
        age = (datetime.now(UTC) - datetime.fromisoformat(self.acquired_at)).total_seconds()
        return f"{self.host.split('/')[0]} (process {self.pid}), for {max(age, 0):.0f} s"


class Lease(ABC):
    """The right to write one run; a context manager that renews itself and gives the lease back at its end."""

    def __init__(self, uri: str, run_id: str, ttl_s: float) -> None:
        self.uri = uri
        self.run_id = run_id
        self.ttl_s = ttl_s

    @staticmethod
    def acquire(storage: Storage, table_uri: str, run_id: str, ttl_s: float = TTL_S, on_wait: OnWait | None = None) -> Lease:
        """Take the lease of a run, or raise LeaseHeldError naming who holds it.

        on_wait: told why and how long, when the lease of a holder on another host has to be watched until it expires.
        """
        uri = storage.join(table_uri, "_masklake", run_id, "lease")
        if parse(uri).is_local:
            return FileLease(uri, run_id, ttl_s)
        return ObjectLease(storage, uri, run_id, ttl_s, on_wait or logger.warning)

    @abstractmethod
    def check(self) -> None:
        """Raise LeaseLostError if the lease is known to be lost or too old; asks no server. Cheap: call it often."""

    @abstractmethod
    def confirm(self) -> None:
        """`check`, and ask the storage: call it right before a commit. StorageError when the storage does not answer."""

    @abstractmethod
    def release(self) -> None:
        """Give the lease back; nothing happens where it is already lost."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _held_by(self, holder: Holder | str) -> LeaseHeldError:
        return LeaseHeldError(
            f"run {self.run_id} is being written by {holder}; wait until it ends, or stop it and start again ({self.uri})"
        )

    def _lost(self, reason: str) -> LeaseLostError:
        return LeaseLostError(
            f"the lease of run {self.run_id} is lost: {reason}; nothing was committed, start again ({self.uri})"
        )


class FileLease(Lease):
    """A lock of the operating system on a local file; it ends with the process, so it needs no renewal."""

    def __init__(self, uri: str, run_id: str, ttl_s: float) -> None:
        super().__init__(uri, run_id, ttl_s)
        self._path = Path(parse(uri).key)
        with translated(uri):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
            self._lock()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            content = self._path.read_bytes()
            self._file.close()
            # The holder writes its name right after it locks: between the two the file may still be empty.
            raise self._held_by(Holder.from_json(content, self.uri) if content else "another process") from None
        self._write(Holder.this_process(self.ttl_s).to_json())

    def _write(self, content: bytes) -> None:
        self._file.truncate(0)
        self._file.write(content)
        self._file.flush()

    def check(self) -> None:
        """Raise LeaseLostError if the lock's file was removed or replaced: another driver may hold the new one."""
        if self._file.closed:
            raise self._lost("it was released")
        try:
            same = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise self._lost("its file was removed")

    def confirm(self) -> None:
        """The same as `check`: the operating system is the storage."""
        self.check()

    def release(self) -> None:
        """Drop the lock. The file stays: removing it would let two waiting drivers lock two different files."""
        if not self._file.closed:
            self._write(b"")
            self._file.close()


class ObjectLease(Lease):
    """An object held by conditional puts and renewed by a thread three times a lifetime."""

    def __init__(self, storage: Storage, uri: str, run_id: str, ttl_s: float, on_wait: OnWait) -> None:
        super().__init__(uri, run_id, ttl_s)
        self._on_wait = on_wait
        self._store, self._key = storage.object_store(uri)
        self._holder = Holder.this_process(ttl_s)
        self._lock = threading.Lock()  # a renewal and a confirmation must not use one entity tag twice
        self._stop = threading.Event()
        self._reason: str | None = None  # why it is lost
        with translated(uri):
            self._etag = self._take()
            self._prove_conditional_puts()
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._renew_for_ever, name=f"lease-{run_id}", daemon=True)
        self._thread.start()

    def _take(self) -> str:
        """The entity tag of our lease object."""
        try:
            return _tag(obstore.put(self._store, self._key, self._holder.to_json(), mode="create"))
        except AlreadyExistsError:
            return self._take_over()

    def _prove_conditional_puts(self) -> None:
        """A store that ignores the condition would let every driver in; so ask for what must be refused."""
        try:
            obstore.put(self._store, self._key, self._holder.to_json(), mode="create")
        except AlreadyExistsError:
            return
        raise StorageError(
            f"{self.uri}: this store ignores conditional puts (If-None-Match), so a run cannot be protected against a second "
            "driver; use a store that has them"
        )

    def _take_over(self) -> str:
        holder, etag = self._read()
        if not holder.is_gone:
            self._watch_until_expired(holder, etag)
        try:
            result = obstore.put(self._store, self._key, self._holder.to_json(), mode={"e_tag": etag})
        except PreconditionError:
            raise self._held_by(self._read()[0]) from None
        logger.info("took over the lease of run %s from %s", self.run_id, holder)
        return _tag(result)

    def _read(self) -> tuple[Holder, str]:
        answer = obstore.get(self._store, self._key)
        return Holder.from_json(bytes(answer.bytes()), self.uri), answer.meta["e_tag"] or ""

    def _watch_until_expired(self, holder: Holder, etag: str) -> None:
        """Return when the lease was not renewed for its lifetime; LeaseHeldError as soon as it is, or on this host at once."""
        if holder.host == _this_host():
            raise self._held_by(holder)
        self._on_wait(
            f"run {self.run_id} is leased to {holder}; if it does not renew within {holder.ttl_s:.0f} s, this driver takes over"
        )
        deadline = time.monotonic() + holder.ttl_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, holder.ttl_s / 10))
            now_holder, now_etag = self._read()
            if now_holder.released:
                raise self._held_by(now_holder)  # it just finished: planning again is right, writing its run again is not
            if now_etag != etag:
                raise self._held_by(now_holder)

    def _renew_for_ever(self) -> None:
        while not self._stop.wait(self.ttl_s / 3):
            try:
                self._renew()
            except PreconditionError:
                self._reason = "another driver took it over"
            except (BaseError, OSError) as error:
                logger.warning("the lease of run %s could not be renewed: %s", self.run_id, describe(error))
            if self._reason:
                return

    def _renew(self) -> None:
        with self._lock:
            started = time.monotonic()  # others count the lifetime from the put's arrival, which is later: ours ends first
            self._holder = replace(self._holder, renewed_at=_now())
            self._etag = _tag(obstore.put(self._store, self._key, self._holder.to_json(), mode={"e_tag": self._etag}))
            self._renewed = started

    def check(self) -> None:
        """Raise LeaseLostError if a renewal was refused, or none succeeded within the lease's lifetime."""
        if self._reason:
            raise self._lost(self._reason)
        if (silent := time.monotonic() - self._renewed) > self.ttl_s:
            raise self._lost(f"it could not be renewed for {silent:.0f} s")

    def confirm(self) -> None:
        """`check`, then renew it now."""
        self.check()
        try:
            with translated(self.uri):
                self._renew()
        except StorageError as error:
            if not isinstance(error.__cause__, PreconditionError):
                raise
            self._reason = "another driver took it over"
            raise self._lost(self._reason) from error

    def release(self) -> None:
        """Mark the lease as given back, unless another driver has it by now."""
        self._stop.set()
        self._thread.join()
        if self._reason:
            return
        self._reason = "it was released"
        content = replace(self._holder, released=True).to_json()
        try:
            obstore.put(self._store, self._key, content, mode={"e_tag": self._etag})
        except (BaseError, OSError) as error:
            logger.warning("the lease of run %s could not be given back, it expires: %s", self.run_id, describe(error))


def _tag(result: obstore.PutResult) -> str:
    etag = result["e_tag"]
    if etag is None:
        raise StorageError("the store gives no entity tags, so a run cannot be protected against a second driver")
    return etag


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _this_host() -> str:
    """Host name, boot id and process namespace; the latter two where the system has them (Linux)."""
    parts = [socket.gethostname()]
    if os.path.exists("/proc/self/ns/pid"):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "/".join(parts)


def _start_tick(pid: int) -> str | None:
    """When a process started, as the kernel's tick count; None where there is no such process or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]  # field 22; the name in field 2 may hold spaces and brackets


def _lives(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives and belongs to someone else
    tick = _start_tick(pid)
    return tick is None or not started or tick == started
