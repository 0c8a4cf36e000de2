"""One file per mechanism: maps from the frozen operator to the adapted one."""
