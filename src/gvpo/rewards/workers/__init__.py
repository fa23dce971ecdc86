"""Processes that call reward functions and can be killed: the pool, the server that forks them, a worker."""
