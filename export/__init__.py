"""Fold, quantize and write the artifacts."""
