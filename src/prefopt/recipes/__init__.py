"""Commented run files for every method, with what the papers advise."""
