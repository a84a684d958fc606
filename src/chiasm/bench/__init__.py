"""chiasm beside its peers: the same work done by both, checked to be equal, and what each took."""
