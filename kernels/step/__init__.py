"""Expansion of a step's packed plan into the tensors that the model reads."""
