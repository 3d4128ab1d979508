"""Lines that are written past a progress bar, by a thread that ends the process and cannot wait for the bar's end."""

from __future__ import annotations

import sys
from typing import Any


def own_line(line: str) -> bytes:
    """Returns the line, on a new one if a progress bar is shown: the bar leaves the cursor behind itself."""
    bars: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    shown = any(not bar.disable for bar in list(getattr(bars, "_instances", ())))
    return (f"\n{line}" if shown else line).encode()
