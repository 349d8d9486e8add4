"""Trains PPO with a gated Transformer-XL on all devices: the published config for Craftax.

Edit the config, or override it: `python train_PPO_trXL_pmap.py KEY=VALUE ...`. All keys: `--help`.
"""

from trxl.runs.run import main

from trainer_PPO_trXL import PPO

config = {
    "ENV_NAME": "Craftax-Symbolic-v1",  # <suite>/<name>, or the name where one suite alone has it
    "RESET_STRATEGY": "pool",  # new worlds for NUM_ENVS / RESET_RATIO environments at a time
    "TOTAL_TIMESTEPS": 1_000_000_000,  # environment steps of all environments together
    "NUM_ENVS": 1024,  # environments in parallel, on all devices together
    "NUM_STEPS": 128,  # steps of each environment per update
    "LR": 2e-4,  # learning rate of Adam
    "GAMMA": 0.999,  # discount
    "ENT_COEF": 0.002,  # weight of the entropy bonus
    "NORMALIZE_VALUE": False,  # values are returns, not in their own scale
    "EMBED_SIZE": 256,  # width of the transformer's stream
    "qkv_features": 256,  # width of queries, keys and values, all heads together
    "num_heads": 8,  # attention heads
    "hidden_layers": 256,  # width of the actor's and the critic's layers
    "num_layers": 2,  # transformer layers
    "WINDOW_MEM": 128,  # steps of memory
    "seed": 0,
}

if __name__ == "__main__":
    main(config, PPO, all_devices=True)
