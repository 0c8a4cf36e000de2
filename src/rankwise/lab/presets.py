"""Settings of comparisons by name, so that a published number has a short command. Options given beside one win over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # under five minutes on two idle cores: an encoder of 22.7 M numbers on real tweets, one composition of four papers
    "demo": {
        "model": "packaged:minilm",
        "data": "packaged:tweets",
        "recipes": ("lora", "dora", "lora_one", "dora + reflora(warmup=8) + bar"),
        "steps": 36,
        "batch_size": 16,
        "seeds": 3,
        "rates": 3,
        "probes": 8,
        "max_length": 40,
        "eval_limit": 400,
        "out": "runs/demo",
    },
    # the causal language model of docs/results: answers that a program verifies, and what is kept of general English
    "smollm2-sums": {
        "model": "packaged:smollm2",
        "data": "packaged:reasoning-gym/chain_sum",
        "recipes": ("lora", "lora_one"),
        "steps": 16,
        "seeds": 3,
        "lrs": ("1e-3",),
        "batch_size": 4,
        "probes": 2,
        "max_length": 96,
        "eval_limit": 24,
        "out": "runs/smollm2-sums",
    },
    # the image comparison of docs/results
    "dinov2-fashion": {
        "model": "packaged:dinov2-small",
        "data": "packaged:fashion-mnist",
        "recipes": ("lora", "dora"),
        "steps": 40,
        "seeds": 3,
        "lrs": ("1e-3",),
        "batch_size": 16,
        "probes": 2,
        "image_size": 56,
        "eval_limit": 300,
        "out": "runs/dinov2-fashion",
    },
}
