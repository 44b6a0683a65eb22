"""Sampling images: from pipelines, running students and training-free solvers."""
