"""Collectives, process groups, symmetric memory, pipeline links and vocabulary slices."""
