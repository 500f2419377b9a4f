"""Helpers for every layer: atomic file writes, processes, random state, checkpoints, settings, error messages."""
