"""Train a student: the clone, losses, data, training loop."""
