"""Synthetic datasets from generative models of trajectories, and correction of actions toward high data density."""
