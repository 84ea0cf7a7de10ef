"""Synthetic data by generative models of trajectories."""
