"""Data on the device: one ring for datasets and replay, and what is looked up in it."""
