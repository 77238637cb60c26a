"""Whether a run will go through, found out before it starts: rows, tokens, model, steps, memory, time."""
