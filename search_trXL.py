"""Searches hyperparameters with a population of runs in one program.

Edit the config, or override it:

python search_trXL.py ENV_NAME=CartPole-v1 POPULATION=64 LR=1e-5..1e-2 num_layers=1,2
"""

from trxl.search.main import main

import train_Muesli_trXL
import train_PPO_trXL
from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO

config = {
    "ALGORITHM": "PPO",  # or Muesli
    "TRAIN": "gradient",  # or evolution of the parameters
    "STRATEGY": "halving",  # or pbt, or the name of an evosax algorithm
    "POPULATION": 27,  # members of a generation; the first generation has the default config
    "BUDGET": None,  # environment steps, summed over members; None: one generation
    "SEEDS": 1,  # seeds per member
    "REPORT_SEEDS": 5,  # new seeds that compare the best config with the default
    # Any key of the trainer: a range LOW..HIGH, choices A,B,C, or one value for all members.
    "LR": "1e-4..1e-2",
    "GAMMA": "0.9..0.999",
}

TRAINERS = {
    "PPO": (PPO, train_PPO_trXL.config),
    "Muesli": (MUESLI, train_Muesli_trXL.config),
}

if __name__ == "__main__":
    main(config, TRAINERS)
