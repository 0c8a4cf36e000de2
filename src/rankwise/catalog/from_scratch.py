"""Layers that are of low rank from the start, trained on their manifold."""
