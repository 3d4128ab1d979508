"""The terminal: results, usage errors, counts, and the lines after an interruption."""
