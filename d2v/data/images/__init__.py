"""Pictures: files and arrays, how they are cut, normalised and augmented."""
