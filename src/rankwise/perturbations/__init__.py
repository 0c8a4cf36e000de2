"""Moves of the trained tensors between backward and step: sharpness-aware and balancing methods."""
