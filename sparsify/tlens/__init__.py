"""Loads and drives TransformerLens models: the only room that knows its versions."""
