"""PPO with a gated Transformer-XL, on one device: `python train_PPO_trXL.py [KEY=VALUE ...]`."""

from trxl.runs.run import main

from trainer_PPO_trXL import PPO

config = {
    "ENV_NAME": "MemoryChain-bsuite",  # <suite>/<name>, or a name of one suite alone
    "ENV_KWARGS": {},  # overrides of its parameters, such as {"memory_length": 20}
    "TOTAL_TIMESTEPS": 500_000,  # environment steps of all environments together
    "NUM_ENVS": 64,  # environments side by side
    "NUM_STEPS": 64,  # steps of each per rollout
    "LR": 5e-4,  # learning rate of Adam
    "GAMMA": 0.99,  # discount
    "ENT_COEF": 0.01,  # weight of the entropy bonus
    "EMBED_SIZE": 64,  # width of the transformer's stream, even
    "num_heads": 4,  # attention heads
    "num_layers": 2,  # transformer layers
    "WINDOW_MEM": 32,  # steps that the memory reaches back, 0 for none
    "WINDOW_GRAD": 32,  # steps that a gradient flows through, divides NUM_STEPS
    "seed": 0,
    "NUM_SEEDS": 1,  # seeds trained at once, from `seed` on
    "RESULTS_DIR": None,  # None: runs/<suite>
    # ---------------------------------------------------------------- seldom touched
    "RESET_STRATEGY": None,  # auto, optimistic or pool; None: the suite's best
    "RESET_RATIO": 16,  # optimistic and pool generate NUM_ENVS / ratio worlds at a time
    "BOOTSTRAP_TRUNCATED": None,  # value of the final observation at a time limit; None: by task
    "TRIAL_CREDIT": True,  # in meta-RL: values run on to a trial's next episode
    "TRIAL_MEMORY": True,  # in meta-RL: the memory lasts for the trial, not the episode
    "EPISODE_END": "beside",  # what is seen of it within a trial: hidden, beside or step
    "PREV_ACTION_REWARD": None,  # both as part of the observation; None: in meta-RL
    "NORMALIZE_OBS": False,  # by running mean and variance
    "NORMALIZE_REWARD": False,  # by the running deviation of discounted returns
    "UPDATE_EPOCHS": 4,  # passes over a rollout
    "NUM_MINIBATCHES": 8,  # of whole environments, per pass
    "ANNEAL_LR": True,  # linearly to 0 over the run
    "GAE_LAMBDA": 0.8,  # of the generalised advantage estimate
    "CLIP_EPS": 0.2,  # of the ratio, and of the value
    "CLIP_VALUE": None,  # by CLIP_EPS too; None: unless NORMALIZE_VALUE
    "NORMALIZE_VALUE": True,  # values in the scale of the returns (PopArt)
    "RETURN_DECAY": 0.95,  # of that scale, per update
    "VF_COEF": 0.5,  # weight of the value loss
    "MAX_GRAD_NORM": 1.0,  # global norm that gradients are clipped to
    "ADAM_EPSILON": 1e-5,  # what Adam adds to a gradient's root mean square
    "ADVANTAGE_FLOOR": 0.0,  # least deviation to divide advantages by, in returns
    "qkv_features": 64,  # width of queries, keys and values, all heads together
    "hidden_layers": 64,  # width of the actor's and the critic's layers
    "MEMORY": "transformer",  # or gru, or none, to compare with
    "NETWORK": "published",  # around the transformer: published, or wide
    "ENCODER": None,  # linear or features; None: by NETWORK
    "SKIP": None,  # whether actor and critic read the encoder's features too; None: by NETWORK
    "HEADS": None,  # mlp or residual; None: by NETWORK
    "encoder_features": 512,  # numbers that ENCODER=features makes of a grid
    "ACTIVATION": "relu",  # of HEADS=mlp: relu or tanh
    "gating": True,  # GTrXL's gates; False: residual sums
    "gating_bias": 2.0,  # how closed the gates start
    "COMPUTE_DTYPE": "float32",  # of matrix products: float32 or bfloat16
    "CHECKPOINT_EVERY": 50,  # updates between checkpoints
    "KEEP_CHECKPOINTS": 2,  # how many of the newest are kept
    "CHECKPOINT_KIND": "full",  # full; learner: parameters and optimiser; params: parameters
    "RESUME": None,  # folder of a run to go on with
    "PARAMS": None,  # folder of a run whose parameters this one starts from
    "TRACK": None,  # wandb or tensorboard
}

if __name__ == "__main__":
    main(config, PPO)
