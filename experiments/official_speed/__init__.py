"""Updates per second of QGF, DQC and FQL against the loops of their official implementations. See `__main__`."""
