"""Several processes as one: what each does of a step, and sums and parameters over all of them.

DeepSpeed's ZeRO beside accelerate's own ways.
"""
