"""The trained artifact: settings and hashes without torch, networks, what a scoring may override."""
