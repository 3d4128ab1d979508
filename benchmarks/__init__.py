"""Claims of speed and accuracy: each script sets us beside a peer, or the paper, and leaves CSV rows and a dated report."""
