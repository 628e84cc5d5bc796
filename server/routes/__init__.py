"""The handlers, one module per family of paths."""
