"""A training run on Ray: options, the initial model, the record of a run, its workers and their messages."""
