"""Evaluation of an SAETransformer: metrics, `evaluate`, and the table of its result."""
