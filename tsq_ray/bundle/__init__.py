"""Trained artifacts: settings and hashes, networks, and overrides for scoring.

Only `weights` imports torch.
"""
