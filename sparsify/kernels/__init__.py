"""Computations that plain torch makes slow or large, each beside its plain reference."""
