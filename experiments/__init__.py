"""Studies that anyone can repeat, each a module with its command, its committed numbers and its figure."""
