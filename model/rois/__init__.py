"""Regions of interest: their features (RoIAlign, RoIPool, RoIWarp), and which of them training samples."""
