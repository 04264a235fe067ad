"""Corpora that are tables: one row per turn, or per turn and annotator."""
