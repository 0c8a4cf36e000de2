"""A model into a smaller one: layer choice and budgets over approximations."""
