"""Profiles, races, the demo: whole programs on top of training and evaluation."""
