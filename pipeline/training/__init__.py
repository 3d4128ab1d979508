"""Training: samples and their order, proposals, the recipe, and the loop of steps, epochs, checkpoints and scores."""
