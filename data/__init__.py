"""Corpora in, exact batches out: importers, splits, Arrow shards, batch plans and streams. Knows no model."""
