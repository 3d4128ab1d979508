"""What a person starts: the command line, and the Ray Train and Ray Data wiring behind it."""
