"""A page with a REST API, and a DICOM node."""
