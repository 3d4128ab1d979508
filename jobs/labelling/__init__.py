"""The driver's side of a labelling run: its plan, its progress, its lost images."""
