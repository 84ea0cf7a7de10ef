"""Searches per second for the nearest pairs of a whole dataset, and their memory. See `__main__`."""
