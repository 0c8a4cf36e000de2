"""Many adapters on one model at once: banks and routed batches."""
