"""The training loop and the folder of its run."""
