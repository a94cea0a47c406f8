"""Layers: what a decoder is made of, each with its share of the weights when several ranks serve one model."""
