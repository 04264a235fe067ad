"""Results of a sweep: leaderboard, status, confirmation and report."""
