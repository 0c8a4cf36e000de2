"""Statistics and a rank in, a low-rank operator out: starts, compressors and compensators."""
