"""Answers to questions that were put in other words before: off unless asked for, and never trusted to vectors alone.

An extra: what it needs is two hundred megabytes. Importing this package without it raises ImportError, which says so.
"""

MISSING = "the semantic cache needs more packages: pip install 'selfhost-cli[semantic]'"

try:
    import numpy as _numpy  # noqa: F401  asked for here, so that what is missing has one message
except ImportError as error:
    raise ImportError(MISSING) from error
