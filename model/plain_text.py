"""Distinguishes text files from other files by their first bytes."""

from __future__ import annotations


def is_text(head: bytes) -> bool:
    """Returns whether the first bytes of a file are readable UTF-8: no control characters except white space."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not just a character that the end of `head` cuts
            return False
        text = head[: error.start].decode()
    return all(character.isprintable() or character.isspace() for character in text)
