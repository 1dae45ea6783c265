"""A run's folder: what may be in it, one process at a time; checkpoints, which are whole or not there."""
