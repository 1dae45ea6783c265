"""What a run is made of: session, stages, checkpoints, guards.

Its numbers: metrics.jsonl and the services beside it.
"""
