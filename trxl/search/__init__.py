"""Hyperparameter search and neuroevolution with a population of runs."""
