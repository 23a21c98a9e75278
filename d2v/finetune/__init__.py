"""Fine-tuning: heads on a pretrained encoder, recipes, data with labels, scores."""
