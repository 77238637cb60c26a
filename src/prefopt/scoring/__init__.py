"""Scores of completions: the patched forward, segment attention, the oracle, and which layout a model can take."""
