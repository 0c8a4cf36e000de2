"""Several updates into one."""
