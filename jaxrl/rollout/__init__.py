"""Agent and environment together, on the device (`device`) or with simulators on CPU cores (`host`, `workers`)."""
