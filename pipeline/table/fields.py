"""Facts of the table that options need, without pyarrow (see `model.fields`)."""

LIKELY_SCORE = 0.5
"""Minimum score of an instance that summaries count and drawings show. Weaker ones, down to the model's threshold (0.05), are
stored because average precision needs them; they outnumber the objects in the images several times.
"""
