"""Triton kernels run in its interpreter where there is no GPU.

Triton reads the variable when a kernel is defined, so it is set while the kernels are imported and taken back: no other
test, and no process that one starts, sees it. Triton's own library may have been imported before; the kernels use nothing
of it that is itself a kernel (`tl.zeros`, `tl.sum`), which would not be interpreted then.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import pytest
import torch


def mend_ranges() -> None:
    """Let `range` take a tensor in the interpreter of triton before 3.7: numpy 2.4 no longer makes an int of one element."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_ranges_too(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_ranges_too


if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    if tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 7):
        mend_ranges()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import masklake.model.kernels.mask_rle_triton
        import masklake.model.kernels.roi_align_triton
        import masklake.model.kernels.suppression_triton  # noqa: F401
