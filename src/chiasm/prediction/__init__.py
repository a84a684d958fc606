"""A network over a whole volume."""
