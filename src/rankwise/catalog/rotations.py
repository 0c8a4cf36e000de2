"""Parameterizations that multiply the weight: rotations, reflections, gains."""

from __future__ import annotations
