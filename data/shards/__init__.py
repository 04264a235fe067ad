"""Arrow shards: where they are stored, their format and their reader."""
