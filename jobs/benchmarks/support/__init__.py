"""Servers used by benchmarks and tests."""
