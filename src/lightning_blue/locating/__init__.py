"""Where a model recalls facts: causal tracing, and a direct probe of where editing works."""
