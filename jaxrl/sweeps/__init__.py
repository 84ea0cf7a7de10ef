"""Many runs as one program: what is swept, the lifted functions, and the processes that share them."""
