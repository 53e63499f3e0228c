"""CortexFlow compiles Vision-Language-Action policies."""
