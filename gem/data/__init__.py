"""Rows of a file or dataset -> pairs -> prompts and padded batches of tokens.

Where the final answer is in a text.
"""
