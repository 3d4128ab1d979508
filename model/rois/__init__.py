"""Regions of interest: their features (RoIAlign, RoIPool, RoIWarp) and their sampling in training."""
