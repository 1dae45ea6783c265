"""`gem demo`: the whole method on a real model, on a CPU, in minutes.

Arithmetic pairs made on the spot.
"""
