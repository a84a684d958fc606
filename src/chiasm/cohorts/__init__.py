"""Which files belong together, and what follows from them."""
