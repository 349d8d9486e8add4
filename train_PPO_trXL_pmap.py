"""Trains PPO with a gated Transformer-XL on all devices: the published config for Craftax.

Edit the config, or override it: `python train_PPO_trXL_pmap.py KEY=VALUE ...`. All keys: `--help`.
"""

from trxl.runs.run import main

from trainer_PPO_trXL import PPO

config = {
    "ENV_NAME": "Craftax-Symbolic-v1",  # <suite>/<name>, or a name that only one suite has
    "RESET_STRATEGY": "pool",  # generates NUM_ENVS / RESET_RATIO levels at a time
    "TOTAL_TIMESTEPS": 1_000_000_000,  # environment steps, summed over environments
    "NUM_ENVS": 1024,  # environments in parallel, summed over devices
    "NUM_STEPS": 128,  # steps of each environment per update
    "LR": 2e-4,  # learning rate of Adam
    "GAMMA": 0.999,  # discount
    "ENT_COEF": 0.002,  # weight of the entropy bonus
    "NORMALIZE_VALUE": False,  # the critic predicts unnormalised returns
    "ADVANTAGE_FLOOR": 0.0,  # the loss of the policy never shrinks
    "EMBED_SIZE": 256,  # width of the residual stream
    "qkv_features": 256,  # width of queries, keys and values, summed over heads
    "num_heads": 8,  # attention heads
    "hidden_layers": 256,  # width of the actor's and the critic's hidden layers
    "num_layers": 2,  # transformer layers
    "WINDOW_MEM": 128,  # steps of memory
    "seed": 0,
}

if __name__ == "__main__":
    main(config, PPO, all_devices=True)
