"""What importers share: rows with line numbers, cells, times, recordings, and the builder of turns and sessions."""
