"""What the model sees of a run's rows, before the run: tokens, loss masks, special tokens, images, cuts."""
