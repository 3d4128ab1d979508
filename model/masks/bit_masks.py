"""Masks of training images with eight pixels per byte: 250 masks of 3000 x 3000 pixels take 280 MB instead of 2.2 GB.

Only the masks of sampled regions are ever unpacked, a few at a time (`model.heads.mask.mask_targets`). Shape letters: G
instances, H x W pixels of their image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masklake.model.devices import sent


@dataclass(frozen=True)
class BitMasks:
    """Masks of the instances in one image.

    bits: uint8 (G, W, ceil(H / 8)), the pixels of a column from the highest bit of its first byte, because run lengths follow
    columns, as does their decoder. height: H, pixels. known: bool (G,), False for an instance without an annotated mask: its
    bits are 0, and no mask is trained on it.
    """

    bits: Tensor
    height: int
    known: Tensor

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, rows: Tensor) -> BitMasks:
        """Returns the masks of `rows`: indices, or bool (G,)."""
        return BitMasks(self.bits[rows], self.height, self.known[rows])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, H, W)."""
        return len(self.bits), self.height, self.bits.shape[1]

    def to(self, device: torch.device) -> BitMasks:
        """Returns the same masks on another device."""
        return BitMasks(sent(self.bits, device), self.height, sent(self.known, device))

    def unpack(self) -> Tensor:
        """Returns uint8 (G, H, W) of 0 and 1."""
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.bits.device)
        columns = ((self.bits[..., None] >> shifts) & 1).flatten(2)[..., : self.height]
        return columns.transpose(1, 2)

    @staticmethod
    def pack(masks: Tensor) -> BitMasks:
        """Packs uint8 or bool (G, H, W): every non-zero pixel is set, every mask is known."""
        return BitMasks.of(masks.detach().cpu().numpy(), (masks.shape[1], masks.shape[2]), len(masks)).to(masks.device)

    @staticmethod
    def of(masks: Iterable[NDArray[np.uint8] | None], size: tuple[int, int], count: int) -> BitMasks:
        """Packs `count` masks (H, W) one after another, so that they need not exist at the same time; None for an unknown
        mask.
        """
        bits = np.zeros((count, size[1], -(-size[0] // 8)), np.uint8)
        known = np.zeros(count, np.bool_)
        for number, mask in enumerate(masks):
            if mask is not None:
                bits[number], known[number] = np.packbits(mask.T, axis=1), True
        return BitMasks(torch.from_numpy(bits), size[0], torch.from_numpy(known))
