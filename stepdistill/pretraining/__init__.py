"""Small teachers, feature networks and a CLIP, trained from nothing."""
