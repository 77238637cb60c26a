"""Many configurations over one data set, trained at the same time in one process."""
