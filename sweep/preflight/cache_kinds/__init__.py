"""The kinds of numbers that frozen models compute once for all trials: encoder features and teacher logits."""
