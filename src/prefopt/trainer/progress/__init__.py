"""What a run shows while it works: one display for all its parts, and what its numbers say."""
