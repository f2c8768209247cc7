"""Where a model recalls facts: causal tracing, and a direct probe of where editing works."""

FILE = "locate.json"  # what was located, of a folder; here, where reading it imports nothing
