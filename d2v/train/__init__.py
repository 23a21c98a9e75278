"""Pretraining and fine-tuning: the runs, their steps, their files."""
