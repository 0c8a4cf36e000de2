"""Parameterizations on tensors and random subspaces: tensor trains, Khatri-Rao products, intrinsic dimension."""

from __future__ import annotations
