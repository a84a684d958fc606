"""Simulated patients: anatomy, lesions, signals."""
