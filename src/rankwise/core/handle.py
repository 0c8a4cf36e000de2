"""The handle of one adapter on a model: train it, look inside, save it, merge it, take it off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core import merge, training
from rankwise.core.bank import BANKS, Bank, bank_of, detach_bank
from rankwise.core.bindings import Adapters, activate_, adapted_layers
from rankwise.core.calls import Calls
from rankwise.core.coverage import coverage_of, summary_of
from rankwise.core.errors import TargetError, TrainingError, did_you_mean
from rankwise.core.freezing import frozen_roles, thaw
from rankwise.core.operators import LowRank, Operator
from rankwise.core.optimizer import BlockOptimizer
from rankwise.core.parameterization import Parameterization
from rankwise.core.protocols import Decision, Freeze, Perturbation, Procedure, RankSchedule
from rankwise.core.queries import as_low_rank
from rankwise.core.randomness import MaskStream
from rankwise.core.recipe import Recipe
from rankwise.core.targets import Target
from rankwise.core.wrapped import Wrapping


class Handle:
    """One adapter on one model. Made by `adapt_` and `load_`.

    Attributes:
        model, recipe, name, seed: as given.
        targets: site name -> layer.
        skipped: layer name -> why it was left out.
        auxiliary: name -> tensor trained whole beside the adapter (a classification head).
        step_count: optimizer steps seen by `after_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        name: str,
        seed: int,
        targets: Mapping[str, Target],
        skipped: Mapping[str, str],
        auxiliary: Mapping[str, nn.Parameter],
        fingerprint: Callable[[], Mapping[str, str]],
        masks: MaskStream,
    ) -> None:
        self.model, self.recipe, self.name, self.seed = model, recipe, name, seed
        self.targets, self.skipped, self.auxiliary = dict(targets), dict(skipped), dict(auxiliary)
        self.fingerprint, self.masks = fingerprint, masks
        self.step_count = 0
        self.perturbation: Perturbation | None = recipe.perturbation.build() if recipe.perturbation else None
        self.schedule: RankSchedule | None = recipe.schedule.build() if recipe.schedule else None
        self.procedure: Procedure | None = recipe.procedure.build() if recipe.procedure else None
        self._optimizer: BlockOptimizer | None = None
        parts = [type(part).__name__ for part in (self.perturbation, self.schedule, self.procedure) if part is not None]
        between = parts[: len(parts) - (self.procedure is not None)]
        self.calls = Calls(next(iter(between), None), next(iter(parts), None), recipe.name)
        second = [part.second_pass for part in (self.perturbation, self.procedure) if part is not None]
        masks.recording = any(second)
        self.wrapping = Wrapping(self)
        if self.procedure is not None:
            self.apply_(self.procedure.begin({site: target.mode_shape() for site, target in self.targets.items()}) or {})
        if self.perturbation is not None:
            for site in self.targets:
                self.parameterization(site).around = self.perturbation.around(site)
        self._hook = model.register_forward_pre_hook(masks.start_forward)

    # -- looking inside ------------------------------------------------------------------------------------------------

    def adapters(self, site: str) -> Adapters:
        """All adapters of one site."""
        if site not in self.targets:
            raise TargetError(f"{site!r} is not an adapted site. {did_you_mean(site, self.targets)}")
        return self.targets[site].module._modules["adapter"]  # type: ignore[return-value]

    def parameterization(self, site: str) -> Parameterization:
        """This adapter's parameterization at one site."""
        return self.adapters(site)[self.name]

    def update_of(self, site: str) -> Operator:
        """W' - W against the untouched base weight, as an operator (m, n)."""
        adapters = self.adapters(site)
        return self.parameterization(site).total_update(adapters.untouched(self.targets[site].module))

    def low_rank_of(self, site: str) -> LowRank | None:
        """The exact factors of the update at one site, scale folded in; None where it is not of low rank."""
        factors = as_low_rank(self.update_of(site))
        return None if factors is None else factors.folded()

    def updates(self) -> dict[str, Operator]:
        """Site -> update: the adapter as data."""
        return {site: self.update_of(site) for site in self.targets}

    @property
    def bank(self) -> Bank | None:
        """Tensors shared by all sites, where the method has some."""
        return bank_of(self.model, self.name)

    def blocks(self) -> dict[str, dict[str, nn.Parameter]]:
        """Site -> role -> trained tensor. Frozen roles are left out."""
        blocks: dict[str, dict[str, nn.Parameter]] = {}
        for site in self.targets:
            roles = {role: p for role, p in self.parameterization(site).roles().items() if p.requires_grad}
            if roles:
                blocks[site] = roles
        if self.bank is not None:
            for name, parameter in self.bank.named_parameters(prefix=f"{BANKS}.{self.name}"):
                owner, _, role = name.rpartition(".")
                if parameter.requires_grad:
                    blocks.setdefault(owner, {})[role] = parameter
        return blocks

    def plain_blocks(self) -> dict[str, dict[str, nn.Parameter]]:
        """Tensors trained whole beside the adapter, as blocks."""
        blocks: dict[str, dict[str, nn.Parameter]] = {}
        named = dict(self.model.named_parameters(remove_duplicate=False))
        for name in self.auxiliary:
            owner, _, role = name.rpartition(".")
            blocks.setdefault(owner, {})[role] = named[name]
        return blocks

    @property
    def trained_numbers(self) -> int:
        """How many numbers are trained, the auxiliary tensors not counted."""
        return sum(tensor.numel() for block in self.blocks().values() for tensor in block.values())

    def coverage(self) -> str:
        """What was adapted, what was not and why, as a table."""
        return coverage_of(self)

    def __repr__(self) -> str:
        return summary_of(self)

    # -- training ------------------------------------------------------------------------------------------------------

    def optimizer(self, lr: float, *, per_layer: bool = False, **overrides: Any) -> BlockOptimizer:
        """The recipe's optimizer over this adapter's tensors. Make it after the model is wrapped (FSDP).

        Args:
            lr: learning rate.
            per_layer: move every layer during backward, as soon as its gradients are there, and free these: the gradients of
                the whole model are then never in memory together. For one process, without accumulation, clipping, gradient
                scalers and whatever else works between backward and step.
            **overrides: arguments of the recipe's steps, such as `weight_decay=0.01` or `ratio=8`.

        Raises:
            ArgumentError: no step of the recipe has such an argument.
            TrainingError: nothing is trained, or the recipe cannot be run per layer.
        """
        self._optimizer = training.optimizer_of(self, lr, per_layer, overrides)
        return self._optimizer

    def before_step(self) -> None:
        """Called by the optimizer at the start of every step."""
        for _, _, adapters in adapted_layers(self.model):
            adapters.checkpointed.clear()
        self.calls.before_step()

    @property
    def learning_rate(self) -> float:
        """The rate of the optimizer's next step."""
        if self._optimizer is None:
            raise TrainingError("there is no optimizer yet; make one with handle.optimizer(lr=…)")
        return float(self._optimizer.param_groups[0]["lr"])

    def after_backward(self, replay: Callable[[], Any] | None = None, *, check_finite: bool = True) -> None:
        """Call after `loss.backward()`: runs the perturbation and the schedule's part before the step.

        With accumulated gradients, call it once, after the last micro-batch.

        Args:
            replay: runs forward and backward of this step again (all its micro-batches), for two-pass methods (SAM). It is
                called at the moved point and meets the same dropout masks.
            check_finite: look for NaN in the gradients. Switch it off under a gradient scaler, which looks itself.

        Raises:
            TrainingError: a gradient is not finite, or a two-pass method got no replay or another step's.
        """
        training.after_backward(self, replay, check_finite)

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Forward and backward of one step, as the recipe wants them: twice for SAM, no backward at all for zeroth order.

        Args:
            closure: gives the loss of this batch; does not call backward. It may be called several times.

        Returns:
            The loss, detached.

        Raises:
            TrainingError: a gradient is not finite.
        """
        return training.backward(self, closure)

    @torch.no_grad()
    def after_step(self) -> None:
        """Call after `optimizer.step()` and before `zero_grad()`: carries out what schedule and procedure decide."""
        from rankwise.core.decisions import carry_out

        for part in (self.schedule, self.procedure):
            if part is None:
                continue
            for site, decision in part.decide(self.step_count, self.blocks(), learning_rate=self.learning_rate).items():
                carry_out(self, site, decision, self._optimizer)
        if self.procedure is not None:
            self.procedure.after_step(self.step_count, self.plain_blocks())
        if self.perturbation is not None:
            self.perturbation.advance()
        self.step_count += 1
        self.calls.after_step()

    def apply_(self, decisions: Mapping[str, Decision]) -> None:
        """Carries out decisions now (prune zero gates, freeze a role), optimizer state included."""
        from rankwise.core.decisions import carry_out

        for site, decision in decisions.items():
            carry_out(self, site, decision, self._optimizer)

    def make_room(self, site: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Before a file fills the tensors of a site: brings their names and shapes to those in the file, optimizer included."""
        entry = self.parameterization(site)
        before = entry.roles()
        entry.make_room(shapes)
        if self._optimizer is not None:
            self._optimizer.exchange(site, before, entry.roles())

    def unfinished(self) -> str | None:
        """Why the schedule has not done its work after the steps taken so far (no rank pruned, say), or None."""
        return None if self.schedule is None else self.schedule.unfinished(self.step_count)

    # -- keeping and removing ------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> Path:
        """Writes recipe, trained tensors and the base's fingerprint; see `rankwise.load_`."""
        from rankwise.core.checkpoint import save

        return save(self, Path(directory))

    def merge_(self) -> None:
        """Writes the update into the weights; the untouched weights are kept for `unmerge_`.

        Raises:
            MergeError: merged already, a weight is tied, or a number is not finite. Nothing is changed then.
        """
        merge.merge_sites(self.model, self.targets, self.name)

    def unmerge_(self) -> None:
        """Takes the update out of the weights again, to the bit.

        Raises:
            MergeError: it is not merged.
        """
        for target in self.targets.values():
            merge.unmerge_site(target, self.name)

    @property
    def merged(self) -> bool:
        """Whether the update is written into the weights."""
        return any(self.name in self.adapters(site).merged for site in self.targets)

    def activate_(self) -> None:
        """Makes this adapter the only one that acts. See `rankwise.activate_` for combinations and rows."""
        activate_(self.model, self.name)

    def detach_(self) -> None:
        """Takes the adapter off; the last one leaves the model as it was before, weights to the bit."""
        for target in self.targets.values():
            merge.take_off(target, self.name)
        detach_bank(self.model, self.name)
        self._hook.remove()
        self.wrapping.close()
        for parameter in self.auxiliary.values():
            parameter.requires_grad_(False)
        thaw(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Training state beside tensors and optimizer: step count, schedules, perturbation; to resume to the bit."""
        parts = {"schedule": self.schedule, "procedure": self.procedure, "perturbation": self.perturbation}
        state: dict[str, Any] = {"step_count": self.step_count, "forwards": self.masks.forwards, "frozen": frozen_roles(self)}
        return state | {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.step_count = int(state["step_count"])
        self.masks.resume(int(state["forwards"]))
        self.apply_({site: Freeze(frozenset(roles)) for site, roles in state.get("frozen", {}).items()})
        for name, part in (("schedule", self.schedule), ("procedure", self.procedure), ("perturbation", self.perturbation)):
            if part is not None:
                part.load_state_dict(state[name])
