"""The proxy, in its two roles: on the box in front of the engine (`server`), and on the laptop (`front`).

Shipped to boxes as a zip, so it imports nothing of ours from outside this package, and only aiohttp, orjson and,
on the box, prometheus-client beside the standard library.
"""
