"""Sparse autoencoders: one file per kind, and the config of each."""
