"""Forced alignment of transcripts and recordings."""
