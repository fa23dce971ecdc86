"""What fills a group: the dataset's own completions, or draws from the policy."""
