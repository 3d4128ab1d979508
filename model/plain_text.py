"""What the first bytes of a file say: text or not."""

from __future__ import annotations


def is_text(head: bytes) -> bool:
    """Whether these bytes, the first of a file, are UTF-8 that can be read: no control characters but white space."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not just a character that the end of `head` cuts
            return False
        text = head[: error.start].decode()
    return all(character.isprintable() or character.isspace() for character in text)
