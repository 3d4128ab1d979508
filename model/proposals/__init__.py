"""The first stage: anchors and the region proposal network (Ren et al. 2015)."""
