"""What a model is worth on held-out pairs, with intervals; tables of it.

Files of scores (`gem score`).
"""
