"""What a person reads and types: answers, usage errors, counts, and the lines of a stop."""
