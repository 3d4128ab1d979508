"""The paper's ways to train the two stages: which of them is trained, and in which order.

Each mode is a sequence of phases. Each phase is a training of its own, with a new optimiser and schedule:

    for phase in PHASES["four_step"]:
        model = begin_phase(model, phase)
        ...  # train as usual: `forward` returns the losses of the trained part
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from masklake.model.config import RpnBackbone, TrainedPart
from masklake.model.fields import TrainingMode
from masklake.model.mask_rcnn import MaskRCNN
from masklake.model.weights.checkpoint import load_state


@dataclass(frozen=True)
class Phase:
    """One phase: the arguments of `MaskRCNN.set_trained_part`, and the source of the RPN's maps (None: as in the model's
    configuration).
    """

    trains: TrainedPart
    rpn_backbone: RpnBackbone | None = None
    fixed_backbone: bool = False


_RPN_ALONE = Phase("rpn", "own")
_DETECTOR_ALONE = Phase("detector", "own")

PHASES: Mapping[TrainingMode, tuple[Phase, ...]] = MappingProxyType(
    {
        # Ren et al. 2015, section 3.2, "approximate joint training".
        "joint": (Phase("joint"),),
        # Halves of a separate training, for proposals that are stored between them.
        "rpn": (Phase("rpn"),),
        "detector": (Phase("detector"),),
        # Mask R-CNN, section 3.1: the RPN "is trained separately and does not share features with Mask R-CNN".
        "separate": (_RPN_ALONE, _DETECTOR_ALONE),
        # Ren et al. 2015, section 3.2, "4-step alternating training" (Mask R-CNN, section 4.4): both alone, then an RPN for the
        # detector's maps, then the detector's own layers for that RPN's proposals.
        "four_step": (
            _RPN_ALONE,
            _DETECTOR_ALONE,
            Phase("rpn", "shared", fixed_backbone=True),
            Phase("detector", "shared", fixed_backbone=True),
        ),
    }
)
"""Phases by mode of training."""


def begin_phase(model: MaskRCNN, phase: Phase) -> MaskRCNN:
    """Returns the model set up for a phase: with the right backbones, and training the right part. It may be `model` itself."""
    kind = model.config.rpn_backbone if phase.rpn_backbone is None else phase.rpn_backbone
    return with_rpn_backbone(model, kind).set_trained_part(phase.trains, phase.fixed_backbone)


def with_rpn_backbone(model: MaskRCNN, kind: RpnBackbone) -> MaskRCNN:
    """Returns the model with an RPN on the detector's maps (`shared`) or on a backbone of its own (`own`); `model` itself if
    nothing changes.

    A new backbone starts as a copy of the detector's: both networks start from the same pre-trained layers (steps 1 and 2). If
    it is removed, the RPN's layers are initialised anew, because they belong to the maps of the removed backbone; the authors'
    program does the same (step 3).
    """
    if model.config.rpn_backbone == kind:
        return model
    changed = MaskRCNN(model.config.model_copy(update={"rpn_backbone": kind}))
    state: dict[str, Tensor] = model.network.state_dict()
    if kind == "own":
        state |= {f"rpn_{name}": weight for name, weight in state.items() if name.startswith("backbone.")}
    else:
        state = {name: weight for name, weight in state.items() if not name.startswith(("rpn.", "rpn_backbone."))}
        state |= {name: weight for name, weight in changed.network.state_dict().items() if name.startswith("rpn.")}
    load_state(changed, state, "the model")
    return changed.to(model.device).train(model.training)
