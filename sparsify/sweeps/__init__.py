"""Many training runs: grids of settings, what is done of them, a process for each."""
