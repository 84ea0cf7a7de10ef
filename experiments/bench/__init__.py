"""How fast the default run's pieces are, as ratios to limits measured in the same process. See `__main__`."""
