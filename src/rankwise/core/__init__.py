"""One algebra: operators, layouts, parameterizations, bindings, recipes. Imports nothing from the shelves."""
