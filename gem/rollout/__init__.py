"""Prompts -> candidates, with the sampler's own token ids and statistics.

By the model itself, or by vLLM.
"""
