"""Synthetic datasets by generative models of trajectories, and the correction of actions towards dense data."""
