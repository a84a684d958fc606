"""Methods x folds x seeds, and completion."""
