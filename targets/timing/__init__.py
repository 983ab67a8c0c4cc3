"""Time shapes in their real runtimes before any student exists."""
