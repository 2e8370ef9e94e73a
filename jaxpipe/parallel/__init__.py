"""Meshes, the names of their axes, and where each parameter lies on them."""
