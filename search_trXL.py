"""A population of runs: searches hyperparameters in one program.

python search_trXL.py ENV_NAME=CartPole-v1 POPULATION=64 LR=1e-5..1e-2 num_layers=1,2
"""

from trxl.search.main import main

import train_Muesli_trXL
import train_PPO_trXL
from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO

config = {
    "ALGORITHM": "PPO",  # whose trainer and default config: PPO or Muesli
    "TRAIN": "gradient",  # or evolution, of parameters
    "STRATEGY": "halving",  # or pbt, or an algorithm of evosax by its name
    "POPULATION": 27,  # members of a generation, the default config among the first
    "BUDGET": None,  # environment steps of all members; None: one generation
    "SEEDS": 1,  # that a member is trained with
    "REPORT_SEEDS": 5,  # fresh ones, on which the best and the default are compared
    # any key of the trainer: a range LOW..HIGH, choices A,B,C, or one value for all members
    "LR": "1e-4..1e-2",
    "GAMMA": "0.9..0.999",
}

TRAINERS = {
    "PPO": (PPO, train_PPO_trXL.config),
    "Muesli": (MUESLI, train_Muesli_trXL.config),
}

if __name__ == "__main__":
    main(config, TRAINERS)
