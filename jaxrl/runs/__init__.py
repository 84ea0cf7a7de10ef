"""One run and its directory: configuration, checkpoints, logs, evaluation and plots."""
