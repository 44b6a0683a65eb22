"""Runs: configuration, loop, checkpoints, guards."""
