"""The `gvpo` command: one file per subcommand."""
