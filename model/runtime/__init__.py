"""Devices, memory, workers and system metrics."""
