"""Training of small teachers, feature networks and a CLIP from scratch."""
