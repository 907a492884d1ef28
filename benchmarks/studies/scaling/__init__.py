"""What the slowest of many data-parallel ranks costs: branches measured, ranks simulated."""
