"""A labelling run: its manifest, lease, worker and output."""
