"""Full-rank training with moments in a subspace of the gradient: everything through the one projector."""
