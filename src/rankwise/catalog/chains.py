"""Long and parallel chains of low-rank updates, and robust training."""
