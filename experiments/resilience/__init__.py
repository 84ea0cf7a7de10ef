"""What is left of a sweep that is killed again and again: all of it, bit for bit. See `__main__`."""
