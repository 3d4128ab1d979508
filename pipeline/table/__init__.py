"""The table of labels: schema, rows, commits (Delta Lake), and SQL over it (DuckDB)."""
