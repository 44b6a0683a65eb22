"""Loss functions, grouped by the idea they serve."""
