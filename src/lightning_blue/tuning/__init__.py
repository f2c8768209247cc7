"""Settings for a model that nobody has published any for: tried on a few facts, and taken back."""

FILE = "tune.json"  # what was tuned, of a folder; here, where reading it imports nothing
