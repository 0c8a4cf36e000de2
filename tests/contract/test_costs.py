"""Trained numbers and extra FLOPs of every parameterization, counted and compared with the formulas of its catalog entry."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.catalog import Entry
from rankwise.lab.counters import flops_of
from rankwise.parameterizations.even_factors import even_factors
from tests.contract.subjects import One, Subject, statistics_of

M, N, TOKENS = 16, 8, 11
ENTRIES = [rankwise.catalog.entry(slug) for slug in rankwise.catalog.names("parameterization")]


def adapted(entry: Entry) -> tuple[nn.Module, rankwise.Handle]:
    model = One(nn.Linear(N, M)).double()
    subject = Subject(entry.slug, entry.make(**entry.tiny))
    known = statistics_of(model, subject, torch.randn(9, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return model, rankwise.adapt_(model, subject.recipe, where=["layer"], statistics=known)


def value(entry: Entry, formula: str) -> float:
    """A formula of the catalog at the tiny arguments; those left out are the defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(entry.make).parameters.items()}
    names = {
        "m": M,
        "n": N,
        "T": TOKENS,
        "min": min,
        "max": max,
        "ceil": math.ceil,
        "sqrt": math.sqrt,
        "log2": math.log2,
        "sum": sum,
        "even_factors": even_factors,
    }
    return eval(formula, {"__builtins__": {}, **defaults, **entry.tiny, **names})


def flops(model: nn.Module) -> int:
    x = torch.randn(TOKENS, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return flops_of(lambda: model(x))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.slug)
def test_trained_numbers_are_those_of_the_formula(entry: Entry) -> None:
    assert entry.numbers, f"{entry.slug} states no trained numbers"
    _, handle = adapted(entry)
    assert handle.trained_numbers == value(entry, entry.numbers)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.slug)
def test_extra_flops_are_those_of_the_formula(entry: Entry) -> None:
    """In training mode, where nothing is cached. Element by element products and Fourier transforms are not counted."""
    assert entry.flops, f"{entry.slug} states no FLOPs"
    model, _ = adapted(entry)
    base = 2 * TOKENS * M * N
    assert flops(model) - base == value(entry, entry.flops)
