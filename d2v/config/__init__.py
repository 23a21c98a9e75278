"""What a run is made of, as frozen dataclasses; presets and recipes of them; their files."""
