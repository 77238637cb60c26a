"""What stops a step, or does it again: numbers that are none, memory that runs out."""
