"""Held-out prompts: answers and what they are worth."""
