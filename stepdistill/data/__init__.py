"""Data: from files to batches in a fixed order."""
