"""The parts of `recipes/benchmark.py`, and the benchmark of serving."""
