"""Study: offline methods on OGBench's own data and simulators."""
