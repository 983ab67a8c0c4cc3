"""The training loop: steps, schedule, guard, checkpoints, processes."""
