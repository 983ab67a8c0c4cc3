"""Clone a teacher: projections, losses, data, trainer."""
