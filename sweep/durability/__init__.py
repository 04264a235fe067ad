"""What survives a kill: lease, mirror and retention of checkpoints."""
