"""Triton kernels run in its interpreter where there is no GPU.

Triton reads the variable when a kernel is defined, so it is set while the kernels are imported and taken back: no other
test, and no process that one starts, sees it. Triton's own library may have been imported before; the kernels use nothing
of it that is itself a kernel (`tl.zeros`, `tl.sum`), which would not be interpreted then.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import model.kernels.mask_rle_triton
        import model.kernels.roi_align_triton  # noqa: F401
