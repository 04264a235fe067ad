"""Drawing the parameters of new trials: the samplers by name, and what they learn from."""
