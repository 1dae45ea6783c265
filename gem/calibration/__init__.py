"""A score fitted to the given pairs: fit, test on pairs and on the model's own samples, score.json."""
