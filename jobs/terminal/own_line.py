"""Lines written while a progress bar may be shown, by a thread that ends the process and cannot close the bar first."""

from __future__ import annotations

import sys
from typing import Any


def own_line(line: str) -> bytes:
    """Returns the line as bytes, after a line break if a progress bar is shown: the cursor stands at the end of the bar."""
    bars: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    shown = any(not bar.disable for bar in list(getattr(bars, "_instances", ())))
    return (f"\n{line}" if shown else line).encode()
