"""Training loops: iteration, epoch and run, and the phases of a schedule."""
