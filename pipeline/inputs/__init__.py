"""Inputs of a run: folders, globs and lists of images."""
