"""Images of one patient, aligned."""
