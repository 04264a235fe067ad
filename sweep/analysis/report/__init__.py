"""`sweep report`: what is best, by how much, what made the difference, and what it cost, on one page."""
