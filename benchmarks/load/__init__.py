"""The parts of `benchmarks.serve`: requests, arrivals, what is made of them, how it is shown."""
