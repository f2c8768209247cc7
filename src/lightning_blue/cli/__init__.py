"""The command line: commands, and the run files they read."""
