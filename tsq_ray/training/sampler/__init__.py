"""TSQNet on Ray Train: from features to a bundle."""
