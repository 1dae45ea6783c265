"""A model is loaded, put under LoRA, and run forward: completions -> hidden states -> statistics or a loss.

The starting policy is kept here.
"""
