"""Discriminators: heads on frozen features, what they are told, and what they see."""
