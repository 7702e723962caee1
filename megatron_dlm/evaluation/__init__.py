"""How good a model is: likelihoods of texts, losses on shards, scores on lm-eval's tasks."""
