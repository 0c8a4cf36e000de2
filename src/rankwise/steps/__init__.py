"""Gradient transformations on role-named blocks, chained by `rankwise.core.step`."""
