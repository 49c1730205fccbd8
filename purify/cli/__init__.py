"""The command ``purify``: one module for each subcommand."""
