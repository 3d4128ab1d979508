"""The options of an input, without pydantic (see `model.fields`)."""

from dataclasses import dataclass
from typing import Annotated

from masklake.model.fields import Option


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InputFields:
    """The images of a run."""

    uri: Annotated[
        str,
        Option(
            "Images: a folder or prefix, a glob pattern in quotes, or a list (Parquet, CSV, JSON, text).",
            argument=True,
            metavar="INPUT",
        ),
    ]
    """Folders are read recursively. A glob may contain *, ?, [] and **. A single image is an input, too. With a trailing slash
    the URI is a folder, even if an object has the same name."""
    column: Annotated[
        str | None, Option("Column (JSON: key) of the list that holds the URIs.", default="uri, or the only one", panel="Input")
    ] = None
    """In a list without a header: the number of the column, from 1."""
