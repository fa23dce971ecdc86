"""Mathematical answers: found in a completion, read, and their values computed, all within bounds."""
