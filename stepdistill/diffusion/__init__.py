"""Noise schedules, predictions, samplers: the mathematics, without networks."""
