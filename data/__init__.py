"""Import corpora, split them, store them as Arrow shards and load reproducible batches; independent of any model."""
