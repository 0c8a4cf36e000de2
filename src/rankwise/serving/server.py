"""Binding a bank to a model: each layer's output gets the update of every row's own adapter added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.core.bindings import adapted_layers
from rankwise.core.bypass import bypass_of
from rankwise.core.errors import ActivationError, ArgumentError, shorten
from rankwise.core.fingerprint import check_fingerprint, weight_hash
from rankwise.core.layouts import LinearLayout
from rankwise.core.targets import Target, find_targets
from rankwise.serving.backends import RUN, pick

if TYPE_CHECKING:
    from rankwise.serving.bank import AdapterBank


class Server:
    """A bank at work on a model. Forward hooks of the bank's layers add the updates; no weight and no class is changed.

    Made by `bank.serve(model)`; a with-block or `detach()` ends it. Several models may share one bank. Adapters that are
    registered later act too, as long as their sites are among those served.

    Raises:
        ActivationError: a site is not in the model or has another shape, is read without a call, or another adapter acts there.
        FingerprintError: an adapter was trained on another base.
    """

    def __init__(self, bank: AdapterBank, model: nn.Module, *, any_base: bool = False) -> None:
        self.bank, self.model = bank, model
        if not bank.sites:
            raise ActivationError("the bank is empty; register or load an adapter before serving it")
        modules = dict(model.named_modules())
        missing = [site for site in bank.sites if site not in modules]
        if missing:
            raise ActivationError(
                f"{len(missing)} of the bank's {len(bank.sites)} sites are not in this model ({shorten(missing)}); its "
                "adapters belong to another base"
            )
        self.targets = find_targets(model, lambda name, _: name in bank.sites)[0]
        _check_layers(bank, model, self.targets)
        if not any_base:
            here: dict[str, str] = {}
            for name, stored in bank.fingerprints.items():
                for site in stored:
                    if site not in here and site in self.targets:
                        here[site] = weight_hash(self.targets[site].module)
                check_fingerprint(stored, here, source=f"adapter {name!r}")
        self._hooks = [
            target.module.register_forward_hook(_hook(bank, bank.sites[site], target)) for site, target in self.targets.items()
        ]

    def detach(self) -> None:
        """Takes the hooks off; the model is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def _check_layers(bank: AdapterBank, model: nn.Module, targets: dict[str, Target]) -> None:
    for site, target in targets.items():
        place = bank.sites[site]
        shape = (bank.B[place].shape[1], bank.A[place].shape[2])
        if (target.m, target.n) != shape:
            raise ActivationError(
                f"{site} is {target.m}×{target.n} in this model, the bank's adapters there are {shape[0]}×{shape[1]}"
            )
        reason = bypass_of(model, site)
        if reason is not None:
            raise ActivationError(f"{site}: {reason}, so rows cannot differ")
        if bank.backend == "gathered" and not isinstance(target.layout, LinearLayout):
            raise ArgumentError(
                f"{site} is a {target.layout.kind} layer, which backend='gathered' cannot do; use 'auto' or 'segmented'"
            )
    busy = [name for name, _, adapters in adapted_layers(model) if name in targets and (adapters.active or adapters.merged)]
    if busy:
        raise ActivationError(
            f"another adapter acts on {shorten(busy)}; call rankwise.activate_(model, None) (and unmerge_) so that the bank "
            "works on the frozen base"
        )


def _hook(bank: AdapterBank, place: int, target: Target) -> Any:
    layout = target.layout

    def add(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        x = inputs[0]
        plan = bank.plan(x.shape[0])
        if plan is None or not plan.segments:
            return None  # the frozen layer's own output, to the bit
        A, B = bank.A[place], bank.B[place]
        if not torch.is_grad_enabled():
            A, B = A.detach(), B.detach()
        backend = pick(plan, x, A, B, layout) if bank.backend == "auto" else bank.backend
        return RUN[backend](y, x, A, B, plan, layout)

    return add
