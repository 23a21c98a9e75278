"""From a path to batches: one room for each modality, and what they share."""
