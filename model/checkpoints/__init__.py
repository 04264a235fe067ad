"""Checkpoints, exports and what identifies them."""
