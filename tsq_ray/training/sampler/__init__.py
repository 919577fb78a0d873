"""TSQNet on Ray Train: features to a bundle."""
