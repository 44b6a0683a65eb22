"""Measurements of sets of images."""
