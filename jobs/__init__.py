"""Entry points: the command line, one module per command, and the Ray Train and Ray Data wiring."""
