"""Parameterizations in a frame read off the weight: singular vectors, LDU, skeletons, and both kinds of magnitudes."""

from __future__ import annotations
