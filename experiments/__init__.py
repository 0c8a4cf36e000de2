"""Published methods used for real, with their tables: `python -m experiments.pretraining`, `… -m experiments.convolutions`."""
