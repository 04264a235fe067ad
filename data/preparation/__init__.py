"""From a corpus to shards: validation, splits and the build."""
