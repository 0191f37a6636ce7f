"""A transformers model in memory as a source."""
