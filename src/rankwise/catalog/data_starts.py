"""Starts that read data, earlier adapters or a quantizer."""

from __future__ import annotations
