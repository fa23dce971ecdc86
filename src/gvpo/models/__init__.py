"""Causal language models: loading them, encoding groups, and the log-probs of completions."""
