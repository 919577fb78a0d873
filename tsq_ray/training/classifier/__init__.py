"""Frame classifiers, for the encoder and the recogniser: a whole network on Ray Train, or a head on a frozen one."""
