"""A model used: answers scored, the best of several taken, one prompt answered.

`gem score` and `gem generate`, and the same from Python.
"""
