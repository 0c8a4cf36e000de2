"""Low-rank matrix problems with a known answer: the testbed on which the library's own steps and starts are run."""
