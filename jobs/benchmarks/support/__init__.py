"""Servers that benchmarks and tests start."""
