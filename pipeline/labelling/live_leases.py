"""Determines which leases of a table are held, without taking or changing them (`pipeline.labelling.lease`)."""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from masklake.pipeline.errors import InputNotFoundError
from masklake.pipeline.labelling.lease import Holder, OnWait
from masklake.pipeline.storage.errors import translated
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import parse_uri
from masklake.pipeline.table.table import Table

logger = logging.getLogger(__name__)

READERS = 16


@dataclass(frozen=True)
class Held:
    """A lease that somebody holds, or held when it was last renewed.

    name: the run's id. certain: whether the operating system says that the holder lives; else only the last renewal is known.
    """

    name: str
    holder: Holder
    certain: bool

    @property
    def seems_alive(self) -> bool:
        """Whether it was renewed within its lifetime, by this host's clock: good enough for a list, not for a decision."""
        renewed = datetime.fromisoformat(self.holder.renewed_at)
        return self.certain or datetime.now(UTC) - renewed < timedelta(seconds=self.holder.ttl_s)


def held(table: Table, names: Iterable[str]) -> dict[str, Held]:
    """Returns the leases that are held, or not known to be free, by name."""
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: _look(table.storage, table.lease_uri(name), name), names)
        return {lease.name: lease for lease in found if lease is not None}


def living(table: Table, names: Iterable[str], on_wait: OnWait = logger.warning) -> list[Held]:
    """Returns the leases whose holders live. Those that expired, or whose process on this host has ended, are left out.

    Of a holder on another host only the last renewal is known, and clocks differ: its lease is watched until it is renewed, or
    for its lifetime. on_wait: called before that with the reason and the duration.
    """
    found = held(table, names)
    unknown = {name: lease for name, lease in found.items() if not lease.certain}
    if not unknown or len(unknown) < len(found):  # one that lives is enough to know
        return [lease for lease in found.values() if lease.certain]
    ttl_s = max(lease.holder.ttl_s for lease in unknown.values())
    first = next(iter(unknown.values()))
    on_wait(f"{first.name} is leased to {first.holder}; it is free if that does not renew it within {ttl_s:.0f} s")
    deadline = time.monotonic() + ttl_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, ttl_s / 10))
        now = held(table, unknown)
        if renewed := [lease for name, lease in now.items() if lease.holder != unknown[name].holder]:
            return renewed
        unknown = {name: lease for name, lease in unknown.items() if name in now}
        if not unknown:
            break
    return []


def _look(storage: Storage, uri: str, name: str) -> Held | None:
    """Returns the holder of a lease; None if there is none, or its process has ended."""
    try:
        content = storage.read_bytes(uri)
    except InputNotFoundError:
        return None
    if not content:  # released
        return None
    if parse_uri(uri).is_local:
        return Held(name, Holder.from_json(content, uri), certain=True) if _is_locked(uri) else None
    holder = Holder.from_json(content, uri)
    return None if holder.is_gone else Held(name, holder, certain=holder.is_here)


def _is_locked(uri: str) -> bool:
    with translated(uri), open(parse_uri(uri).key, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False  # closing the file releases the lock
