"""Frame classifiers for the encoder and the recogniser: whole networks, or heads on frozen ones."""
