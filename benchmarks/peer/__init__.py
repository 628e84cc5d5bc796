"""Other programs that run the same models, for benchmarks/peers.py."""
