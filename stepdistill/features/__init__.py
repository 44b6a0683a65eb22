"""Feature networks: images in, one vector each out."""
