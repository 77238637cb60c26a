"""How a run ends, whenever it does: signals, and the record that it leaves."""
