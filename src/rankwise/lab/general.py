"""Retention: what adapting costs on things the task is not about.

Language models: the mean loss per token on held-back general text; the base's own value is the point to compare with.
Classifiers have no such loss. Their stand-in is the drift of the encoder's pooled features f on general inputs,

    mean ‖f' - f‖² / mean ‖f - f̄‖²

with f from the frozen base: 0 for the base itself, 1 where features moved as far as they differ among inputs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import DataError
from rankwise.lab.data import load_data
from rankwise.lab.models import CAUSAL

KJV, PYTHON = "packaged:kjv", "packaged:python"
TEXTS = 48  # held-back texts that are read


def general_text(choice: str, training_data: str) -> tuple[list[str], str]:
    """Held-back general texts and what they are; an empty list with the reason where there are none.

    Args:
        choice: "auto", "none", or the name of plain-text data.
        training_data: what the task trains on, which is no general text for it.

    Raises:
        DataError: the named data cannot be used.
    """
    if choice == "none":
        return [], "switched off"
    spec = choice
    if choice == "auto":
        spec = KJV if shutil.which("bible") and training_data != KJV else PYTHON
    if spec == training_data:
        raise DataError(
            f"retention is measured on text that the task is not about, but it trains on {spec} itself; name other data"
        )
    data = load_data(spec, task=CAUSAL)
    if "text" not in data.columns:
        raise DataError(f"{spec}: retention needs plain text (a column 'text'); its rows have {', '.join(data.columns)}")
    return [str(row[data.columns["text"]]) for row in data.evaluation[:TEXTS]], spec


def photographs(side: int, count: int = 32) -> Tensor:
    """(count, 3, side, side) uint8 cut-outs of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    cuts = []
    for picture in load_sample_images().images:  # type: ignore[union-attr]
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)  # (3, height, width)
        step = pixels.shape[1] // 4
        grid = [pixels[:, y : y + step, x : x + step] for y in range(0, 4 * step, step) for x in range(0, 4 * step, step)]
        cuts += [
            nn.functional.interpolate(cut[None].float(), size=(side, side), mode="bilinear", antialias=True) for cut in grid
        ]
    return torch.cat(cuts)[:count].round().to(torch.uint8)


def pooled_features(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor | None:
    """(inputs, width) mean of the encoder's last hidden states over tokens; None where the model has no such part."""
    encoder: Any = getattr(model, str(getattr(model, "base_model_prefix", "")) or "-", None)
    if encoder is None:
        return None
    training, found = model.training, []
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                hidden = getattr(encoder(**batch), "last_hidden_state", None)
                if hidden is None or hidden.dim() != 3:
                    return None
                mask = batch.get("attention_mask", torch.ones(hidden.shape[:2], device=hidden.device))[..., None].to(
                    hidden.dtype
                )
                found.append((hidden * mask).sum(1) / mask.sum(1))
    finally:
        model.train(training)
    return torch.cat(found)


class FeatureDrift:
    """Drift of pooled features against a frozen base, which is asked once.

    Args:
        base: gives the untouched model.
        batches: gives the general inputs.
    """

    def __init__(self, base: Callable[[], nn.Module], batches: Callable[[], Sequence[dict[str, Tensor]]]) -> None:
        self.base, self.batches = base, batches
        self._kept: tuple[Sequence[dict[str, Tensor]], Tensor | None] | None = None

    def of(self, model: nn.Module) -> float | None:
        """The drift of a model."""
        if self._kept is None:
            batches = self.batches()
            self._kept = (batches, pooled_features(self.base(), batches))
        batches, frozen = self._kept
        now = pooled_features(model, batches)
        if frozen is None or now is None:
            return None
        spread = (frozen - frozen.mean(0)).square().sum(1).mean()
        return float((now - frozen).square().sum(1).mean() / spread)
