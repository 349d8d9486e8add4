"""A population of runs: hyperparameters searched in one program, or parameters evolved."""
