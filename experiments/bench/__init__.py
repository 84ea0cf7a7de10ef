"""How fast sweeps, the default run's pieces and a peer are, as ratios measured in one process. See `__main__`."""
