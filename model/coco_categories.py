"""COCO's categories with their original ids, and the keypoints of "person" (Lin et al. 2014)."""

from __future__ import annotations

from masklake.model.config import Category

PERSON_KEYPOINTS = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)
PERSON_FLIP_PAIRS = tuple((left, left + 1) for left in range(1, 17, 2))
PERSON_SKELETON = (
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8)),
    *((7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
)

NO_CATEGORY = "N/A"
"""Name of ids that COCO planned but never annotated."""

# Ids 1 to 90 in order; an empty name is an id without annotations.
_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,stop sign,parking meter,bench,"
    "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,backpack,umbrella,,,handbag,tie,suitcase,frisbee,skis,"
    "snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,,wine glass,cup,fork,"
    "knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,,"
    "dining table,,,toilet,,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,,book,clock,"
    "vase,scissors,teddy bear,hair drier,toothbrush"
)

PERSON = Category(id=1, name="person", keypoints=PERSON_KEYPOINTS, flip_pairs=PERSON_FLIP_PAIRS, skeleton=PERSON_SKELETON)

COCO_CATEGORIES = tuple(
    PERSON if name == "person" else Category(id=index, name=name)
    for index, name in enumerate(_NAMES.split(","), start=1)
    if name
)
"""The 80 annotated categories."""

COCO_RAW_CATEGORIES = tuple(
    PERSON if name == "person" else Category(id=index, name=name or NO_CATEGORY)
    for index, name in enumerate(_NAMES.split(","), start=1)
)
"""All 90 ids, as torchvision's 91 class logits have them. The ten ids without annotations are called "N/A": trained weights
never report them, and random ones do in torchvision as well, so keeping them keeps the two systems' outputs equal."""
