"""Many prompts: read, asked a few at a time, kept as they come, and not asked again after a kill."""
