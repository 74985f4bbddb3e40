"""A market on loopback that speaks vast.ai's REST contract, and its real boxes: for the demo and the tests.

market.py     the process: options, server, idleness, market.json
api.py        what the SDK calls                 control.py  what tests and the demo switch and ask
catalogue.py  offers, filters, prices            billing.py  the clock that counts money
instances.py  rented machines and their stages   faults.py   what can go wrong, on demand
answers.py    what faults make of any answer     timeline.py the market's time, which tests move
mirror.py     the cache directory over HTTP, with switches
box.py        a box's supervisor process         image.py    what a box's directory consists of
processes.py  descendants, leftovers, namespaces
"""
