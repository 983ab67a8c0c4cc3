"""Encodings, importance matrix, and mixed precision."""
