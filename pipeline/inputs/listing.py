"""Lists the images of an input: a folder, a pattern, a list, or one image.

Everything is streamed as Arrow batches. Entries that are not images of the input, or could never be read, are left out here and
counted by reason. A row that reaches a run can be requested by exactly its name.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from masklake.model.errors import ConfigError
from masklake.model.plain_text import is_text
from masklake.pipeline.errors import InputNotFoundError
from masklake.pipeline.inputs.fields import InputFields
from masklake.pipeline.inputs.lists import Named, list_kind, read_list
from masklake.pipeline.inputs.suffixes import IMAGE_REGEX, IMAGE_SUFFIXES, OTHER_SUFFIXES, UNREAD_REGEX
from masklake.pipeline.storage.handles import CONCURRENT_HEADS
from masklake.pipeline.storage.left_out import LeftOut, Reason
from masklake.pipeline.storage.literal_keys import MAX_KEY_BYTES, is_plain
from masklake.pipeline.storage.objects import OBJECT_SCHEMA
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.storage.uri import below, canonical, parent, parse_uri, relative_to
from masklake.pipeline.storage.walk import is_utf8

_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
_PACKED = (".zst", ".zstd", ".lz4", ".lzma", ".lzo", ".br", ".sz", ".z")
_SHEETS = (".xlsx", ".xls", ".ods")
_HEAD_BYTES = 4096
_TEXT_IMAGE = re.compile(rb"P[123]\s")  # PBM, PGM and PPM may be written in digits
_OTHER_SYSTEMS = "@eaDir|__MACOSX|#recycle|#snapshot|@Recycle|@Recently-Snapshot|\\$RECYCLE\\.BIN|System Volume Information"
_HIDDEN = rf"(?:^|/)(?:\.(?:[^./]|\.[^/])|(?:{_OTHER_SYSTEMS})/)"
"""RE2 on a path below the input's folder: a part that begins with a dot (`._x.jpg`, `.thumbnails/`; not `.` and `..`), and the
folders in which macOS, Windows, Synology and QNAP keep thumbnails and waste."""


def nothing_found(storage: Storage, uri: str) -> str:
    """Returns the message for an input without any image. It suggests checking the path only if the path may be wrong."""
    if is_glob(uri) and not storage.exists(uri):
        braces = "; braces are literal, so give a folder or a list instead" if "{" in uri else ""
        return f"matches no image; check the pattern{braces}"
    if list_kind(uri) is not None and not uri.endswith("/") and storage.is_file(uri):
        return "is a list that names no image; write one per row"
    return "holds no image; check the path"


class InputSpec(BaseModel, InputFields, frozen=True):
    """The images to label. A later start with an equal specification continues the run."""

    model_config = ConfigDict(extra="forbid")

    def canonical(self) -> InputSpec:
        """Returns the same input with canonical names; a trailing slash is kept."""
        uri = parse_uri(self.uri).uri
        folder = self.uri.endswith("/") and not uri.endswith("/") and not is_glob(uri)
        return self.model_copy(update={"uri": f"{uri}/" if folder else uri})

    def resolved(self, storage: Storage) -> InputSpec:
        """Returns the canonical input without a trailing slash that has no meaning, so that a folder has one spelling.

        Raises ConfigError for a pattern in the bucket, one that ends in a slash, or a name that cannot be stored,
        InputNotFoundError for a local file with a trailing slash.
        """
        if not is_utf8(self.uri):
            raise ConfigError(f"{os.fsencode(self.uri)!r}: is not UTF-8, as a table needs it; rename it, or link to it")
        if _WINDOWS.match(self.uri) and not os.path.lexists(self.uri):
            raise ConfigError(f"{self.uri}: is a Windows path, and this system has no drives; give its path here (/mnt/c/...)")
        spec = self.canonical()
        at = parse_uri(spec.uri)
        if is_glob(at.bucket):
            raise ConfigError(f"{spec.uri}: a pattern cannot choose the bucket; name it")
        if is_glob(spec.uri) and self.uri.endswith("/") and not storage.exists(spec.uri):
            raise ConfigError(
                f"{self.uri}: a pattern matches files, and no file ends in a slash; write {self.uri}* or {self.uri}**"
            )
        if at.is_local and spec.uri.endswith("/") and os.path.isfile(at.key):
            raise InputNotFoundError(f"{spec.uri}: is a file where a folder is needed; leave out its last slash")
        plain = at.key if at.is_local else canonical(spec.uri)
        twin = not at.is_local and spec.uri.endswith("/") and storage.is_file(plain)
        return spec if twin else spec.model_copy(update={"uri": plain})


def is_glob(uri: str) -> bool:
    """Returns whether `uri` may be a pattern."""
    return any(sign in uri for sign in "*?[")


def list_inputs(storage: Storage, spec: InputSpec, left_out: LeftOut | None = None) -> Iterator[pa.RecordBatch]:
    """Yields every image of the input as OBJECT_SCHEMA batches. Names in a list may repeat, those in a folder do not.

    In folders and prefixes, files with an image suffix are images, except hidden ones; a glob and a list may name any file.
    Relative names in a list are relative to the list's folder. Rows without an `etag` are looked up in the storage, in
    parallel; etag stays null if there is no such object. left_out: counts the other entries. Raises InputNotFoundError for a
    missing folder, bucket or list, ConfigError for a missing column or an unknown kind of list.
    """
    left_out = LeftOut() if left_out is None else left_out
    spec = spec.resolved(storage)
    if _is_one_object(storage, spec.uri):
        yield from _list_file(storage, spec, left_out)
    elif is_glob(spec.uri) and not storage.exists(spec.uri):
        yield from _list_glob(storage, spec.uri, left_out)
    else:
        yield from list_images(storage, spec.uri, left_out)


def _is_one_object(storage: Storage, uri: str) -> bool:
    """Returns whether the input is an object and not a folder. An empty S3 object next to a prefix of its name marks a
    folder.
    """
    if uri.endswith("/") or not storage.is_file(uri):
        return False
    if parse_uri(uri).is_local or storage.stat(uri).bytes:
        return True
    return next(storage.list_objects(f"{uri}/"), None) is None


def _list_file(storage: Storage, spec: InputSpec, left_out: LeftOut) -> Iterator[pa.RecordBatch]:
    if spec.uri.lower().endswith(_ARCHIVES):
        raise ConfigError(f"{spec.uri}: is an archive; unpack it, and give the folder")
    if spec.uri.lower().endswith(_SHEETS):
        raise ConfigError(f"{spec.uri}: is a spreadsheet; save it as CSV")
    if spec.uri.lower().endswith(_PACKED):
        raise ConfigError(f"{spec.uri}: is compressed in a way that lists cannot be; unpack it, or use .gz, .bz2 or .xz")
    if list_kind(spec.uri) is None:
        _check_no_text(storage, spec.uri)
        yield storage.stat_many([spec.uri])
        return
    base = parent(spec.uri)
    for rows in read_list(storage, spec.uri, spec.column, left_out):
        named = [(uri, row) for row in rows if (uri := _listed_uri(base, row.name, left_out)) is not None]
        faults = _unreadable_files([uri for uri, _ in named if parse_uri(uri).is_local])
        for uri, row in named:
            if uri in faults:
                left_out.add(faults[uri], row.name)
        readable = [(uri, row) for uri, row in named if uri not in faults]
        yield _with_etags(storage, [uri for uri, _ in readable], [row for _, row in readable])


def _check_no_text(storage: Storage, uri: str) -> None:
    """Raises ConfigError for a text file without the suffix of an image: it may be a list whose name does not say so."""
    if uri.lower().endswith((*IMAGE_SUFFIXES, *OTHER_SUFFIXES)):
        return
    with storage.open_input(uri) as source:
        head = source.read(_HEAD_BYTES)
    if head and is_text(head) and not _TEXT_IMAGE.match(head):
        raise ConfigError(f"{uri}: is text and no image; if it is a list, name it .txt (one name per line), .csv or .jsonl")


# -- folders and patterns ----------------------------------------------------------------------------------------------


def list_images(storage: Storage, uri: str, left_out: LeftOut) -> Iterator[pa.RecordBatch]:
    """Yields the images below a folder or prefix, by suffix (any case), except hidden files and those of other systems."""
    base = below(uri)
    for batch in storage.list_objects(uri, left_out):
        images = pc.match_substring_regex(batch["uri"], IMAGE_REGEX, ignore_case=True)
        unread = pc.match_substring_regex(batch["uri"], UNREAD_REGEX, ignore_case=True)
        batch = _chosen(batch, pc.or_(images, unread), base, left_out, Reason.OTHER_FILES)
        batch = _without_hidden(batch, base, left_out)
        images = pc.match_substring_regex(batch["uri"], IMAGE_REGEX, ignore_case=True)
        batch = _chosen(batch, images, base, left_out, Reason.OTHER_FORMATS)
        if batch.num_rows:
            yield batch


def _without_hidden(batch: pa.RecordBatch, base: str, left_out: LeftOut) -> pa.RecordBatch:
    names = pc.utf8_slice_codeunits(batch["uri"], start=len(base))
    return _chosen(batch, pc.invert(pc.match_substring_regex(names, _HIDDEN)), base, left_out, Reason.OTHER_SYSTEMS)


def _chosen(batch: pa.RecordBatch, mask: pa.BooleanArray, base: str, left_out: LeftOut, reason: Reason) -> pa.RecordBatch:
    """Returns the rows of the mask. The others are counted, and the first of them is named by its path below `base`."""
    chosen = batch.filter(mask)
    if chosen.num_rows < batch.num_rows:
        first = batch["uri"][pc.index(mask, False).as_py()].as_py()
        left_out.add(reason, first[len(base) :], batch.num_rows - chosen.num_rows)
    return chosen


def fixed_folder(pattern: str) -> str:
    """Returns the folder that contains all matches of a pattern: the part before the first wildcard, up to its last slash."""
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    return fixed[: fixed.rindex("/") + 1]


def _list_glob(storage: Storage, pattern: str, left_out: LeftOut) -> Iterator[pa.RecordBatch]:
    base = fixed_folder(pattern)
    names_hidden = re.search(r"(^|/)\.[^/]", pattern[len(base) :])  # as in a shell, * finds what is hidden only when told to
    regex = _checked_regex(pattern)
    matching = left_out.filtered(partial(_could_match, pattern))
    for batch in storage.list_objects(canonical(base), matching, partial(reaches, pattern)):
        batch = batch.filter(pc.match_substring_regex(batch["uri"], regex))
        if not names_hidden:
            batch = _without_hidden(batch, base, left_out)
        if batch.num_rows:
            yield batch


def reaches(pattern: str, folder: str) -> bool:
    """Returns whether a pattern can match names below `folder`: with `**` anywhere, else if its first parts match the
    folder.
    """
    parts, depth = pattern.split("/"), folder.count("/") + 1
    return "**" in pattern or (depth < len(parts) and re.match(glob_regex("/".join(parts[:depth])), folder) is not None)


def _could_match(pattern: str, reason: Reason, name: str) -> bool:
    """Returns whether a pattern could match an entry that a listing left out. name: a local path, or a key in the bucket."""
    at = parse_uri(pattern)
    uri = name if at.is_local else f"{at.scheme}://{at.bucket}/{name}"
    if reason in (Reason.UNREADABLE_FOLDERS, Reason.LINKED_FOLDERS):
        return reaches(pattern, uri)
    return re.match(glob_regex(pattern), uri) is not None


def _checked_regex(pattern: str) -> str:
    """Returns the pattern's expression. Raises ConfigError if RE2, which matches names, or Python (folders) refuses it."""
    regex = glob_regex(pattern)
    try:
        re.compile(regex)
        pc.match_substring_regex(pa.array([""]), regex)
    except (re.error, pa.ArrowInvalid) as error:
        raise ConfigError(f"{pattern}: not a pattern that can be matched ({error}); check its brackets") from error
    return regex


def glob_regex(pattern: str) -> str:
    """Returns the RE2 expression of a shell pattern: `*` and `?` stay within a folder, `**/` matches any number of folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "^(?s:" + "".join(wild.get(part) or _literal_or_class(part) for part in parts) + ")$"


def _literal_or_class(part: str) -> str:
    if re.fullmatch(r"\[[^\]]+\]", part):
        negated, members = part[1] == "!", part[1:-1].removeprefix("!").replace("\\", "\\\\")
        return f"[{'^' if negated else ''}{members}]"
    return re.escape(part)


# -- lists -------------------------------------------------------------------------------------------------------------


def _listed_uri(base: str, name: str, left_out: LeftOut) -> str | None:
    """Returns the URI that a row of a list names, or None if it could never be read."""
    uri: str | None = None
    try:
        reason = _unnameable(name)
        if reason is None:
            uri = relative_to(base, name)
            reason = _unreadable(uri)
    except ConfigError:  # another scheme, or no bucket
        reason = Reason.NO_CLIENT
    if reason is not None:
        left_out.add(reason, name)
    return uri if reason is None else None


def _unnameable(name: str) -> Reason | None:
    if _WINDOWS.match(name):
        return Reason.WINDOWS_PATHS
    if not is_utf8(name):
        return Reason.NOT_UTF8
    return Reason.SLASH_AT_END if name.endswith("/") else None


def _unreadable(uri: str) -> Reason | None:
    """Returns why no request for this key could ever succeed, or None."""
    at = parse_uri(uri)
    if at.is_local:
        return None
    if at.scheme != "s3":
        return None if is_plain(at.key) else Reason.NO_CLIENT
    return None if at.key and len(at.key.encode()) <= MAX_KEY_BYTES else Reason.NO_SUCH_NAME


def _unreadable_files(paths: Sequence[str]) -> dict[str, Reason]:
    """Returns the local paths that could never be read, with the reasons. They are checked in parallel, because network file
    systems are slow.
    """
    with ThreadPoolExecutor(CONCURRENT_HEADS) as pool:
        reasons = pool.map(_unreadable_file, paths)
        return {path: reason for path, reason in zip(paths, reasons, strict=True) if reason is not None}


def _unreadable_file(path: str) -> Reason | None:
    """Returns why this path can never be read, or None. A path that does not exist or is forbidden may be readable later."""
    try:
        mode = Path(path).stat().st_mode
    except ValueError:  # a zero byte
        return Reason.NO_SUCH_NAME
    except OSError as error:
        return {errno.ENAMETOOLONG: Reason.NO_SUCH_NAME, errno.ELOOP: Reason.BROKEN_LINKS}.get(error.errno or 0)
    if stat.S_ISDIR(mode):
        return Reason.FOLDERS
    return None if stat.S_ISREG(mode) else Reason.NOT_REGULAR


def _with_etags(storage: Storage, uris: Sequence[str], rows: Sequence[Named]) -> pa.RecordBatch:
    """Returns OBJECT_SCHEMA rows; etag and bytes that the list does not contain come from the storage."""
    unknown = [uri for uri, row in zip(uris, rows, strict=True) if row.etag is None]
    stats = iter(storage.stat_many(unknown).to_pylist()) if unknown else iter(())
    known: list[tuple[str | None, int | None]] = []
    for row in rows:
        found = next(stats) if row.etag is None else None
        known.append((found["etag"], found["bytes"]) if found is not None else (row.etag, row.bytes))
    columns = [list(uris), [etag for etag, _ in known], [size for _, size in known]]
    return pa.record_batch(columns, schema=OBJECT_SCHEMA)
