"""Data, tasks, comparison and reports: what the command line is made of."""
