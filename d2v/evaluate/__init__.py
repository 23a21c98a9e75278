"""What a model knows: frozen features and their probes, scores of what was fine-tuned."""
