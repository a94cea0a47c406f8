"""Layers of a decoder, each with its rank's share of the weights."""
