"""Answers that were given before: sealed, on the laptop or in a Redis of one's own, and never on a box."""
