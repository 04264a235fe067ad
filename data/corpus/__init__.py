"""A corpus before it is sharded: its schema, audio, settings and findings."""
