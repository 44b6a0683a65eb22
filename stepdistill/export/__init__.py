"""A student as a plain diffusers directory, and back."""
