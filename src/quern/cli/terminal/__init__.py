"""The terminal: its language, its streams, progress, how a command ends."""
