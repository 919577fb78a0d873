"""Trained artifacts: settings and hashes, networks, and overrides when scoring.

Only `weights` imports torch.
"""
