"""Expansion of a step's packed plan into model inputs."""
