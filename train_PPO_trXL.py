"""Trains PPO with a gated Transformer-XL on one device.

Edit the config, or override it: `python train_PPO_trXL.py KEY=VALUE ...`. All keys: `--help`.
"""

from trxl.runs.run import main

from trainer_PPO_trXL import PPO

config = {
    "ENV_NAME": "MemoryChain-bsuite",  # <suite>/<name>, or a name that only one suite has
    "ENV_KWARGS": {},  # parameters of the environment, such as {"memory_length": 20}
    "TOTAL_TIMESTEPS": 500_000,  # environment steps, summed over environments
    "NUM_ENVS": 64,  # environments in parallel
    "NUM_STEPS": 64,  # steps of each environment per update
    "LR": 1e-3,  # learning rate of Adam
    "GAMMA": 0.99,  # discount
    "EMBED_SIZE": 64,  # width of the residual stream
    "num_layers": 2,  # transformer layers
    "WINDOW_MEM": None,  # steps of memory; None: half of NUM_STEPS
    "seed": 0,
    "NUM_SEEDS": 1,  # seeds trained in parallel: seed, seed + 1, ...
}

if __name__ == "__main__":
    main(config, PPO)
