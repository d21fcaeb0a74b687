"""Data: shards and their indexes, the plan of training order, decoding, the loader. Imports no model, no engine."""
