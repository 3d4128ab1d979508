"""The driver's side of a labelling run: plan, progress, and images lost with their workers."""
