"""Pretrained networks: frame encoders, recognisers, text embeddings, their weights, inference."""
