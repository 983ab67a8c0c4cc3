"""The commands, and the stages that they run."""
