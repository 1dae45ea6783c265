"""Candidates -> token entropies -> scores -> ranking -> group advantages.

Which tokens count, and which differences are noise.
"""
