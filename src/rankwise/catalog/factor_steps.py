"""Steps on the factors B and A, clipping, and decay by role."""
