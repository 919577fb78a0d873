"""Benchmarks; each script prints its tables."""
