"""Many runs as one program: the sweep's space, the lifted functions, and multi-process execution."""
