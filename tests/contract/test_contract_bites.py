"""The contract must bite: each planted fault is caught, by the check whose name says what is wrong."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core import adapt, bindings, merge
from rankwise.core.bank import Bank
from rankwise.core.combinators import RowScale, Sum
from rankwise.core.layouts import Layout
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Additive, Facts, Parameterization, Site
from rankwise.core.piece import Piece, register
from rankwise.core.queries import row_norms
from rankwise.core.recipe import Recipe
from tests.contract import checks, test_costs
from tests.contract.subjects import LINEAR, LayerKind, Subject


class _Plain(Additive):
    """A correct low-rank update, for the faults to be planted into."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.rank, self.scale = 2, 0.5
        self.A = nn.Parameter(site.normal(2, site.n))
        self.B = nn.Parameter(site.zeros(site.m, 2))

    @classmethod
    def roles_of(cls, **arguments: object) -> frozenset[str]:
        return frozenset({"A", "B"})

    def update(self) -> Operator:
        return LowRank(self.B, self.A, self.scale)


def _operator(**overrides: Callable[..., object]) -> type[LowRank]:
    """A low-rank operator with some methods replaced by faulty ones; the fused path is off so that they are met."""
    return type("Faulty", (LowRank,), {"add_to_base": lambda *_: None, **overrides})


def _with_update(name: str, operator: type[LowRank], **members: object) -> type[_Plain]:
    def update(self: _Plain) -> Operator:
        return operator(self.B, self.A, self.scale)

    return type(name, (_Plain,), {"update": update, **members})


def _subject(method: type[Parameterization]) -> Subject:
    if method.__name__ not in _known:
        register("parameterization")(method)
        _known.add(method.__name__)
    recipe = Recipe(
        name=method.__name__,
        parameterization=Piece("parameterization", method.__name__),
        step=(Piece("step", "adamw"),),
    )
    return Subject(method.__name__, recipe)


_known: set[str] = set()
# A square layer, on which a transposed matrix has the right shape.
SQUARE = LayerKind("Square", "linear", lambda: nn.Linear(8, 8), LINEAR.inputs)


def _transposed(self: LowRank, y: Tensor, x: Tensor, layout: object) -> Tensor:
    return y + nn.functional.linear(x, self.dense().t())


def _unscaled(self: LowRank, y: Tensor, x: Tensor, layout: object) -> Tensor:
    return y + nn.functional.linear(x, self.B @ self.A)


def _detached(self: LowRank, y: Tensor, x: Tensor, layout: object) -> Tensor:
    return y + nn.functional.linear(x, self.dense().detach()) + 0 * (self.B.sum() + self.A.sum())


def _bias_again(self: LowRank, y: Tensor, x: Tensor, layout: object) -> Tensor:
    return y + nn.functional.linear(x, self.dense()) + torch.ones_like(y)


def _wrong_dtype(self: LowRank, y: Tensor, x: Tensor, layout: object) -> Tensor:
    return y.float() + nn.functional.linear(x.float(), self.dense().float())


def _global_draw(self: _Plain) -> Operator:
    torch.rand(1)
    return LowRank(self.B, self.A, self.scale)


def _stale_forward(self: Parameterization, base: Operator) -> Operator:
    adapted = Sum(base, LowRank(self.B, self.A))  # type: ignore[arg-type]
    # In eval, a plan that nothing ever drops.
    scale = row_norms(adapted) if self.training else self.__dict__.setdefault("plan", row_norms(adapted).detach())
    return RowScale(adapted, scale)


def _copied_bank(self: _Plain, site: Site) -> None:
    _Plain.__init__(self, site)
    assert site.bank is not None
    self.register_buffer("copied", site.bank["shared"].clone())


FAULTS: dict[str, tuple[type[Parameterization], str, str]] = {
    "transposed factor": (_with_update("Transposed", _operator(add_to=_transposed)), "path_equals_weight", "in value"),
    "missing scale": (_with_update("Unscaled", _operator(add_to=_unscaled)), "scale_is_applied", "the one reported"),
    "detached gradient": (_with_update("Detached", _operator(add_to=_detached)), "every_tensor_trains", "gets a gradient"),
    "bias added twice": (_with_update("BiasTwice", _operator(add_to=_bias_again)), "starts_at_base", "equals the base"),
    "wrong dtype": (_with_update("WrongDtype", _operator(add_to=_wrong_dtype)), "half_precision_base", "base's dtype"),
    "global RNG touched": (
        type("GlobalDraw", (_Plain,), {"update": _global_draw}),
        "global_generators_untouched",
        "global generator",
    ),
    "stale cached plan": (
        type("StalePlan", (_Plain,), {"forward": _stale_forward, "facts": Facts(additive=False)}),
        "training_mode_equals_eval",
        "no stale plan",
    ),
    "shared tensor copied per layer": (
        type(
            "CopiedBank",
            (_Plain,),
            {
                "__init__": _copied_bank,
                "shared": classmethod(lambda cls, sites, **_: Bank({"shared": torch.ones(3)}, seed=0)),
            },
        ),
        "shared_tensors_once",
        "copied per layer",
    ),
}


def _check(name: str) -> checks.Check:
    return getattr(checks, f"check_{name}")


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_planted_fault_is_caught(fault: str) -> None:
    method, check, message = FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        _check(check)(_subject(method), SQUARE)


@pytest.mark.parametrize("check", [*checks.ON_EVERY_LAYER, *checks.ON_ONE_LAYER], ids=checks.name_of)
def test_sound_method_passes(check: checks.Check) -> None:
    check(_subject(_Plain), LINEAR)


def test_unfrozen_base_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapt, "freeze", lambda model, auxiliary: None)
    with pytest.raises(AssertionError, match="the base is frozen"):
        checks.check_base_untouched(_subject(_Plain), LINEAR)


def test_written_base_is_caught() -> None:
    def forward(self: _Plain, base: Operator) -> Operator:
        weight = base.plain_weight() if hasattr(base, "plain_weight") else None
        if weight is not None:
            with torch.no_grad():
                weight.add_(1e-12)
        return Sum(base, self.update())

    with pytest.raises(AssertionError, match="the base is untouched"):
        checks.check_base_untouched(_subject(type("WritesBase", (_Plain,), {"forward": forward})), LINEAR)


def test_inexact_unmerge_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    write = merge._write

    @functools.wraps(write)
    def subtracting(target: object, merged: tuple[str, ...]) -> None:
        write(target, merged)  # type: ignore[arg-type]
        if not merged:
            with torch.no_grad():
                target.parameter().mul_(1 + 1e-15)  # type: ignore[attr-defined]

    monkeypatch.setattr(merge, "_write", subtracting)
    with pytest.raises(AssertionError, match="to the bit"):
        checks.check_merge_equals_forward(_subject(_Plain), LINEAR)


def test_adapter_left_out_of_a_copy_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "_rebuild", lambda original: original.__new__(original))
    with pytest.raises(AssertionError, match=r"deepcopy|pickle"):
        checks.check_copies(_subject(_Plain), LINEAR)


def test_wrong_rank_bound_is_caught() -> None:
    class Narrow(LowRank):
        def dense(self) -> Tensor:
            return (self.B @ self.A) * self.scale + torch.eye(*self.shape, dtype=self.B.dtype)

    with pytest.raises(AssertionError, match="is within the bound"):
        checks.check_low_rank_reproduces_dense(_subject(_with_update("WrongRank", Narrow)), LINEAR)


@pytest.mark.parametrize(("field", "wrong"), [("numbers", "rank*m"), ("flops", "2*T*rank*m")])
def test_wrong_cost_formula_is_caught(field: str, wrong: str) -> None:
    entry = dataclasses.replace(rankwise.catalog.entry("lora"), **{field: wrong})
    check = {"numbers": test_costs.test_trained_numbers_are_those_of_the_formula}.get(
        field, test_costs.test_extra_flops_are_those_of_the_formula
    )
    with pytest.raises(AssertionError):
        check(entry)


def test_update_formed_as_a_matrix_is_caught_by_its_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    def formed(self: LowRank, x: Tensor, layout: Layout) -> Tensor:
        return layout.matrix(x, self.dense())

    monkeypatch.setattr(LowRank, "apply", formed)
    monkeypatch.setattr(LowRank, "add_to", Operator.add_to)
    monkeypatch.setattr(LowRank, "add_to_base", lambda *_, **__: None)
    with pytest.raises(AssertionError):
        test_costs.test_extra_flops_are_those_of_the_formula(rankwise.catalog.entry("lora"))


def test_bias_left_behind_by_unmerge_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(_Plain):
        def adapted_bias(self, bias: Tensor) -> Tensor:
            return bias + self.B.sum(1)

    checks.check_merge_equals_forward(_subject(Shifted), LINEAR)
    write = merge._write_bias
    monkeypatch.setattr(merge, "_write_bias", lambda target, merged: write(target, merged) if merged else None)
    with pytest.raises(AssertionError, match="the bias to the bit"):
        checks.check_merge_equals_forward(_subject(Shifted), LINEAR)


def test_faults_do_not_enter_the_catalog() -> None:
    assert not {name for name in rankwise.catalog.names() if name in _known}
