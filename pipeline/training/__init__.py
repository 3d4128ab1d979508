"""A training run's data and recipe: samples, their order, stored proposals, curves."""
