"""Many training runs: lists of settings, a process for each, a table of the results."""
