"""The table of labels: its schema, rows and commits (Delta Lake), and SQL queries over it (DuckDB)."""
