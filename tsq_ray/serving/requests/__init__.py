"""Requests to the endpoint: parsing, limits, and whether they may be answered."""
