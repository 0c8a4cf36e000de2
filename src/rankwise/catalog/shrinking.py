"""Training that finds the ranks on the way and leaves a smaller network."""
