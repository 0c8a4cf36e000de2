"""Settings of comparisons by name, so that a published number has a short command."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Six minutes on two cores: a real encoder, real tweets, and a composition that no other library can train.
    "demo": {
        "model": "packaged:minilm",
        "data": "packaged:tweets",
        "recipes": ["lora", "dora", "lora_one", "dora + reflora(warmup=5) + bar"],
        "steps": 48,
        "seeds": 3,
        "rates": 4,
        "batch_size": 16,
        "max_length": 40,
        "eval_limit": 1000,
    },
    # The causal language model of docs/results: answers that a program verifies, and what is kept of general English.
    "smollm2-sums": {
        "model": "packaged:smollm2",
        "data": "packaged:reasoning-gym/chain_sum",
        "recipes": ["lora", "rslora(rank=16)", "lora_one"],
        "steps": 24,
        "seeds": 3,
        "lrs": "3e-4,1e-3,3e-3",
        "batch_size": 4,
        "max_length": 96,
        "eval_limit": 100,
    },
    # The image comparison of docs/results.
    "dinov2-fashion": {
        "model": "packaged:dinov2-small",
        "data": "packaged:fashion-mnist",
        "recipes": ["lora", "dora", "lora_xs(rank=16)"],
        "steps": 80,
        "seeds": 3,
        "lrs": "1e-4,3e-4,1e-3,3e-3",
        "batch_size": 32,
        "image_size": 56,
        "eval_limit": 1000,
    },
}
