"""What the stages need to run on Ray. The modules import ray only inside functions."""
