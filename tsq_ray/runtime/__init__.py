"""Ray for the stages that use it. Its modules import ray only when called."""
