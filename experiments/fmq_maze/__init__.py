"""FMQ on the default maze: offline, then online, and what each of its parts contributes. See `__main__`."""
