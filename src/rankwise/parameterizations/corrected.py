"""The gradient correction of LoRA-FA: with A frozen, the best step that B can take towards the full gradient.

    g_B ← (1/s²) g_B (A Aᵀ + ε I)⁻¹          so that s·g_B A = G Aᵀ(A Aᵀ)⁻¹A, G = ∂L/∂W (m, n)

That is the orthogonal projection of the full gradient on the row space of A. The value of B passes through unchanged; only its
gradient is multiplied, so optimizers, accumulation, sharding and copies need to know nothing of it. Moments see the corrected
gradient. 2mr² FLOPs more in forward and backward, and one inverse of an (r, r) matrix.

Zhang et al.: LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning, 2023, arXiv:2308.03303
(the correction is that of its second version).
"""

from __future__ import annotations

import torch
from torch import Tensor


def correct_gradient(B: Tensor, A: Tensor, scale: float, damping: float) -> Tensor:
    """B (m, r) as it is, to the bit, with its gradient multiplied by (A Aᵀ + damping I)⁻¹ / scale², A (r, n)."""
    wide = A.detach().to(torch.promote_types(A.dtype, torch.float32))
    gram = wide @ wide.t()  # (r, r)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.inv(gram + damping * eye).to(B.dtype) / scale**2
    value = B.detach()
    return value + (B - value) @ inverse  # the second term is zero; it is there for its gradient
