"""What any use of a causal language model needs: loading, tokens, passes, scores and texts."""
