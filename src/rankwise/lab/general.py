"""General text and images that no task is about, and what a model still knows of them: retention.

Text is the King James Bible where it is installed, else the reference texts that come with Python; images are crops of the two
photographs that scikit-learn ships. A language model's retention is its loss on that text. A classifier has no such loss, so
its stand-in is drift: one minus the mean cosine between the body's features now and those of the frozen base.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.lab.data import bible_text

PIECES, PIECE_LENGTH = 32, 400  # passages, and characters of each


def general_text() -> tuple[str, list[str]]:
    """(name, passages): fixed passages of general English."""
    text, name = bible_text(), "KJV"
    if text is None:
        from pydoc_data.topics import topics

        text, name = "\n".join(topics[key] for key in sorted(topics)), "Python's reference texts"
    starts = random.Random(0).sample(range(0, len(text) - PIECE_LENGTH), PIECES)
    return name, [" ".join(text[start : start + PIECE_LENGTH].split()) for start in starts]


def general_images(size: int) -> tuple[str, Tensor]:
    """(name, images): fixed crops of photographs, (32, 3, size, size) in [0, 1]."""
    from sklearn.datasets import load_sample_images

    generator, crops = random.Random(0), []
    photographs = [torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
    for index in range(PIECES):
        photograph = photographs[index % len(photographs)]
        top, left = generator.randrange(photograph.shape[1] - 224), generator.randrange(photograph.shape[2] - 224)
        crop = photograph[None, :, top : top + 224, left : left + 224]
        crops.append(nn.functional.interpolate(crop, size=(size, size), mode="bicubic", antialias=True, align_corners=False))
    return "scikit-learn's sample photographs", torch.cat(crops).clamp(0, 1)


def language_loss(model: nn.Module, tokenizer: Any, passages: Sequence[str], length: int) -> float:
    """Mean loss per token of a causal language model on passages."""
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(passages), 8):
            batch = tokenizer(
                list(passages[start : start + 8]), return_tensors="pt", truncation=True, max_length=length, padding=True
            )
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            tokens = int((labels[:, 1:] != -100).sum())
            total += float(model(**batch, labels=labels).loss) * tokens
            count += tokens
    return total / count


class Drift:
    """One minus the mean cosine between a classifier body's features now and at the start, on fixed general inputs.

    Args:
        model: the untouched model.
        batches: general inputs, as keyword arguments of the model.
    """

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
        self.batches = batches
        self.before = self._features(model)

    def _features(self, model: nn.Module) -> Tensor:
        features = []
        with torch.no_grad():
            for batch in self.batches:
                hidden = model(**batch, output_hidden_states=True).hidden_states[-1]  # (batch, tokens, width)
                mask = batch.get("attention_mask", torch.ones(hidden.shape[:2]))[..., None].to(hidden.dtype)
                features.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(features)

    def __call__(self, model: nn.Module) -> float:
        """The drift of this model."""
        cosine = nn.functional.cosine_similarity(self._features(model), self.before, dim=1)
        return float(1 - cosine.mean())
