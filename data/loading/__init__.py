"""From shards to batches: tasks, examples, augmentation, batch plans and sources."""
