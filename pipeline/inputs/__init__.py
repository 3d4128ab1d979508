"""What a run is given: folders, globs and lists of images."""
