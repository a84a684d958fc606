"""Scores of one image against another."""
