"""Data in and out: storage, manifest, fetch, decode, labelling actor, table, training data, evaluation."""
