"""Parameterizations whose layers share tensors, or draw them from a seed."""

from __future__ import annotations
