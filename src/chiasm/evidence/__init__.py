"""What may be claimed."""
