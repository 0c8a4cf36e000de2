"""Training without backward: zeroth-order estimates and rankings."""
