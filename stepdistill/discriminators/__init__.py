"""Discriminators: heads on frozen features, their conditioning, augmentation and feature networks."""
