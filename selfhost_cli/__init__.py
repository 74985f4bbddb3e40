"""selfhost: Claude Code on a rented GPU, without ever paying for a forgotten box."""

__version__ = "0.1.0"
