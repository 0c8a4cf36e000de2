"""rankwise and PEFT on the same model in one run: exact counters first, then interleaved times. `python -m benchmarks`."""
