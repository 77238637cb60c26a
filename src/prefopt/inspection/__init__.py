"""What can be seen of a run before it starts, and of a model afterwards."""
