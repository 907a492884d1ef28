"""Compares what was written with the original, on a copy of the user's block, and remembers it."""
