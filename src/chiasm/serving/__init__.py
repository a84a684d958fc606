"""A DICOM node."""
