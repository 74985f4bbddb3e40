"""The detached process, one per profile, that lives while a rental does.

It owns the local port that Claude Code talks to (the front), holds each rental's tunnel and lease, and ends boxes
that nobody will ever use: those whose `up` died before they were ready.
"""
