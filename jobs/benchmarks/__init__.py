"""Measurements: each script prints one table."""
