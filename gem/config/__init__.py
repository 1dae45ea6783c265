"""Every setting of a run: its name, type, default, meaning and range.

Read from YAML and flags, checked, saved and printed.
"""
