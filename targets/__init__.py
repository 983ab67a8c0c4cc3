"""Run each artifact in its real runtime and compare it with the PyTorch student."""
