"""What finds orders where none is drawn: list scheduling, repeated blocks, and search."""
