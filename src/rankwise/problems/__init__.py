"""Low-rank matrix problems with known truth: the field's classical testbeds."""
