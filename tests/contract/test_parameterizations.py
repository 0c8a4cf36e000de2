"""Every parameterization of the catalog × every kind of layer its facts claim × every promise of the contract."""

from __future__ import annotations

import pytest

from tests.contract.checks import ON_EVERY_LAYER, ON_ONE_LAYER, Check, name_of
from tests.contract.subjects import LAYERS, LayerKind, Subject, first_kind, fits, subjects

SUBJECTS = subjects()
PAIRS = [(subject, kind) for subject in SUBJECTS for kind in LAYERS if fits(subject, kind)]


@pytest.mark.parametrize("check", ON_EVERY_LAYER, ids=name_of)
@pytest.mark.parametrize(("subject", "kind"), PAIRS, ids=[f"{subject.name}-{kind.name}" for subject, kind in PAIRS])
def test_contract(subject: Subject, kind: LayerKind, check: Check) -> None:
    _run(subject, kind, check)


@pytest.mark.parametrize("check", ON_ONE_LAYER, ids=name_of)
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_contract_on_one_layer(subject: Subject, check: Check) -> None:
    _run(subject, first_kind(subject), check)


def test_every_subject_works_somewhere() -> None:
    for subject in SUBJECTS:
        kinds = {kind.kind for other, kind in PAIRS if other is subject}
        assert kinds == subject.facts.layouts, f"{subject.name} claims {set(subject.facts.layouts)}, fits {kinds}"


def _run(subject: Subject, kind: LayerKind, check: Check) -> None:
    reason = subject.facts.expected_failures.get(name_of(check))
    if reason is None:
        check(subject, kind)
        return
    with pytest.raises(AssertionError):
        check(subject, kind)
