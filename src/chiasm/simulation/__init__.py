"""Patients that are made: anatomy, lesions, signals."""
