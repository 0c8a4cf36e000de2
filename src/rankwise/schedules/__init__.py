"""Pure decisions about ranks, freezing and restarts; the handle carries them out."""
