"""Sampling, penalties and log-probabilities."""
