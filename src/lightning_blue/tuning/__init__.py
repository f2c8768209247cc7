"""Settings for a model that nobody has published any for: tried on a few facts, and taken back."""
