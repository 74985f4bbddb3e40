"""How fast the rented box is, measured through the front as Claude Code uses it.

`plan` says what to send and how long that takes, `client` sends it with a clock, `run` does it in order, `figures`
makes numbers of what was measured, `plot` draws them. Only `client` does I/O, and `plot` writes its file.
"""
