"""Counts the entries that a listing leaves out, by reason, so that users know why 10,000 files are 9,990 images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from enum import StrEnum

from masklake.model.wording import counted, printable

_NAME_LENGTH = 120  # maximum number of characters of a name in a line


class Reason(StrEnum):
    """Why an entry is not an image of the input."""

    OTHER_FILES = "other_files"
    OTHER_FORMATS = "other_formats"
    OTHER_SYSTEMS = "other_systems"
    UNREADABLE_FOLDERS = "unreadable_folders"
    UNREADABLE_FILES = "unreadable_files"
    BROKEN_LINKS = "broken_links"
    LINKED_FOLDERS = "linked_folders"
    NOT_REGULAR = "not_regular"
    FOLDERS = "folders"
    GONE = "gone"
    NOT_UTF8 = "not_utf8"
    SLASH_AT_END = "slash_at_end"
    NO_SUCH_NAME = "no_such_name"
    NO_CLIENT = "no_client"
    WINDOWS_PATHS = "windows_paths"
    COMMENTS = "comments"
    UNNAMED = "unnamed"


_WORDS = {
    Reason.OTHER_FILES: ("without an image's suffix", "without an image's suffix"),
    Reason.OTHER_FORMATS: ("image of a format that is not read", "images of formats that are not read"),
    Reason.OTHER_SYSTEMS: ("hidden or of other systems", "hidden or of other systems"),
    Reason.UNREADABLE_FOLDERS: ("unreadable folder", "unreadable folders"),
    Reason.UNREADABLE_FILES: ("unreadable file", "unreadable files"),
    Reason.BROKEN_LINKS: ("link that leads nowhere", "links that lead nowhere"),
    Reason.LINKED_FOLDERS: ("link to a folder", "links to folders"),
    Reason.NOT_REGULAR: ("pipe, socket or device", "pipes, sockets or devices"),
    Reason.FOLDERS: ("folder", "folders"),
    Reason.GONE: ("removed meanwhile", "removed meanwhile"),
    Reason.NOT_UTF8: ("name that is not UTF-8", "names that are not UTF-8"),
    Reason.SLASH_AT_END: ("name that ends in a slash", "names that end in a slash"),
    Reason.NO_SUCH_NAME: ("name that its storage cannot hold", "names that their storage cannot hold"),
    Reason.NO_CLIENT: ("address that no storage client here reads", "addresses that no storage client here reads"),
    Reason.WINDOWS_PATHS: ("Windows path", "Windows paths"),
    Reason.COMMENTS: ("comment", "comments"),
    Reason.UNNAMED: ("row without a name", "rows without a name"),
}


class LeftOut:
    """Counts by reason, with the first name for each."""

    def __init__(self) -> None:
        self._counts: Counter[Reason] = Counter()
        self._first: dict[Reason, str] = {}

    def add(self, reason: Reason, name: str, count: int = 1) -> None:
        """Adds entries for a reason. name: one of them."""
        if count:
            self._counts[reason] += count
            self._first.setdefault(reason, name)

    def filtered(self, belongs: Callable[[Reason, str], bool]) -> LeftOut:
        """Returns a counter that passes on to this one the entries for which `belongs` returns True."""
        return _Filtered(self, belongs)

    def counts(self) -> dict[str, int]:
        """Returns the counts by reason; reasons that did not occur are absent."""
        return {reason.value: count for reason, count in self._counts.items()}

    def names(self) -> dict[str, str]:
        """Returns the first name for each reason, shortened for display."""
        return {reason.value: _shown(name) for reason, name in self._first.items()}

    def restore(self, counts: Mapping[str, int], names: Mapping[str, str]) -> None:
        """Adds the `counts` and `names` of an earlier start of the same run."""
        for reason, count in counts.items():
            self.add(Reason(reason), names.get(reason, ""), count)

    def __str__(self) -> str:
        r"""Returns one line, empty if nothing was left out: `left out: 3 Windows paths (C:\a.jpg), 1 unreadable folder
        (/a/b)`.
        """
        parts = [
            counted(count, *_WORDS[reason]) + (f" ({_shown(self._first[reason])})" if self._first[reason] else "")
            for reason, count in self._counts.items()
        ]
        return f"left out: {', '.join(parts)}" if parts else ""


class _Filtered(LeftOut):
    def __init__(self, whole: LeftOut, belongs: Callable[[Reason, str], bool]) -> None:
        super().__init__()
        self._whole = whole
        self._belongs = belongs

    def add(self, reason: Reason, name: str, count: int = 1) -> None:
        if self._belongs(reason, name):
            self._whole.add(reason, name, count)


def _shown(name: str) -> str:
    """Returns a name on one line: control characters and foreign bytes are escaped, long names lose their middle."""
    text = printable(name)
    return text if len(text) <= _NAME_LENGTH else f"{text[: _NAME_LENGTH // 2]}...{text[-_NAME_LENGTH // 2 :]}"
