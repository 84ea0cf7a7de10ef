"""FMQ and behaviour cloning, offline on a data file of OGBench's point maze. See `__main__`."""
