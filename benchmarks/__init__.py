"""Claims of speed: each script runs us and a peer side by side and leaves a CSV row and a dated report."""
