"""What is saved of a run, and what a run goes on from."""
