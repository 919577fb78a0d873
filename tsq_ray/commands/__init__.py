"""The commands of `tsq`, each a function of its options."""
