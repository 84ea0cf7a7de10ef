"""Reinforcement learning with generative policies over action chunks, as one XLA program."""

__version__ = "0.1.0"
