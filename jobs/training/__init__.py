"""The driver's and the workers' side of a training run."""
