"""From files to arrays that a network learns from."""
