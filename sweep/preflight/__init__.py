"""What runs before the first trial: checks, feature caches and dry runs."""
