"""Muesli with a gated Transformer-XL: `python train_Muesli_trXL.py [KEY=VALUE ...]`."""

from trxl.runs.run import main

from trainer_Muesli_trXL import MUESLI

config = {
    "ENV_NAME": "MemoryChain-bsuite",  # <suite>/<name>, or a name of one suite alone
    "ENV_KWARGS": {},  # overrides of its parameters, such as {"memory_length": 20}
    "TOTAL_TIMESTEPS": 500_000,  # environment steps of all environments together
    "NUM_ENVS": 64,  # environments side by side
    "NUM_STEPS": 64,  # steps of each per rollout
    "LR": 5e-4,  # learning rate of Adam
    "GAMMA": 0.99,  # discount
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
    "UPDATE_EPOCHS": 1,  # passes over a rollout
    "REPLAY_SHARE": 0.75,  # of a minibatch that is replayed
    "REPLAY_ROLLOUTS": 8,  # how many of the newest are kept for that
    "NUM_MINIBATCHES": 32,  # of whole environments, per pass; replayed ones come on top
    "ANNEAL_LR": True,  # linearly to 0 over the run
    "RETRACE_LAMBDA": 0.95,  # of the off-policy returns
    "TARGET_RATE": 0.1,  # how far the acting parameters move per gradient step
    "CMPO_CLIP": 1.0,  # of the advantages that the policy is regularised by
    "CMPO_SAMPLES": 16,  # actions to try where they are many or real-valued
    "EXACT_ACTIONS": 64,  # up to so many are all tried
    "ADVANTAGE_DECAY": 0.99,  # of the advantages' variance, per gradient step
    "ADVANTAGE_FLOOR": 0.1,  # least deviation to divide them by, in returns
    "MODEL_STEPS": 5,  # that the model looks ahead
    "MODEL_SIZE": 64,  # width of its latents
    "VALUE_BINS": 101,  # numbers that values and rewards are spread over
    "VALUE_LIMIT": 20.0,  # the largest of them, squashed: a return of 422
    "PG_COEF": 1.0,  # weight of the policy gradient
    "CMPO_COEF": 1.0,  # weight of the regularised policy
    "MODEL_COEF": 1.0,  # weight of the model's policies
    "REWARD_COEF": 1.0,  # weight of the model's rewards
    "VF_COEF": 0.25,  # weight of the values, the model's too
    "ENT_COEF": 0.0,  # weight of the entropy bonus
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
    main(config, MUESLI)
