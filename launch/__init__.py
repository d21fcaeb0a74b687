"""Commands around training: evaluation, the demo, conversions. Nothing imports this package."""
