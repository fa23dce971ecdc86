"""The objective inside other trainers: thin adapters over `gvpo.objective`."""
