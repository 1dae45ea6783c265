"""Adapters against the trainers themselves, in environments of their own: `python -m tests.integrations.others verl`.
Not part of the suite, which has stand-ins (test_others.py)."""
