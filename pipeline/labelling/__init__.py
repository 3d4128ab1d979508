"""A labelling run: its manifest, lease, workers and output."""
