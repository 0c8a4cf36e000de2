"""Parameterizations with masks, sparse parts, or one adapter per example."""

from __future__ import annotations
