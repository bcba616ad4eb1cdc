"""How good an SAETransformer is: metrics, `evaluate`, and the table of its result."""
