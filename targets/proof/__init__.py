"""Compare each artifact, in its runtime, with the PyTorch student."""
