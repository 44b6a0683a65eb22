"""Diffusers pipelines for students that no stock pipeline can express.

Each file is self-contained: an export copies it beside the weights, and stock diffusers runs it without this package.
"""
