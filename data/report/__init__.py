"""A prepared corpus for people: in a few rows for the terminal, and as a page."""
