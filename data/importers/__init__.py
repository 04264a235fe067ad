"""One small file a corpus format; each yields the `Corpus` of `data.schema`."""
