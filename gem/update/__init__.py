"""Optimizer steps: reflective SFT, SEGA, DPO.

The optimizer, over any number of processes, and the same under DeepSpeed.
"""
