"""What lies on disk: one reader that refuses what others misread, one writer that keeps geometry."""
