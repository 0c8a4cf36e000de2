"""Methods that own the loop or the network, built from the other pieces."""
