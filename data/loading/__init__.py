"""From shards to batches: tasks, examples, batch plans and sources."""
