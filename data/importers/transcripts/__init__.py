"""Transcripts of recognisers and of people: one file per session."""
