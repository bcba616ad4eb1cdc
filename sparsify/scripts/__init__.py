"""Command-line jobs: one folder each, with its config, its loop and its recipes."""
