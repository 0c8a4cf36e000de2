"""Parameterizations whose update has a high rank for few numbers: products of factors, frequencies, blocks, sparse entries."""

from __future__ import annotations
