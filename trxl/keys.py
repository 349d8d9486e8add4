"""Every setting in one table: default, type, bounds, help.

`SHARED_KEYS` are the settings of any algorithm; an algorithm's table is made by `with_shared` from
its own ones. `--help`, docs/keys.md and what a resumed run may change come from such a table.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

GROUPS = ("Environment", "Training", "Network", "Run")


class Key(NamedTuple):
    """One setting. Where the default is None, a value may be None too."""

    default: Any  # what it is worth where a config does not have it
    help: str  # one line of Markdown: what it is, and its unit
    group: str = "Training"  # one of GROUPS
    type: Any = None  # of a value; None: the default's
    low: float | None = None  # inclusive bounds; None is no bound
    high: float | None = None
    choices: tuple[str, ...] = ()  # all values that there are, if they are few
    traced: bool = False  # whether a value may be traced, so that `jax.vmap` sweeps it
    resumable: bool = True  # whether a resumed run may change it

    @property
    def kind(self) -> type:
        """The type of a value that is not None."""
        return self.type or type(self.default)


Keys = Mapping[str, Key]


def environment(*args: Any, **more: Any) -> Key:
    """A key of the environment: what a state means depends on it."""
    return Key(*args, **{"group": "Environment", "resumable": False, **more})


def network(*args: Any, **more: Any) -> Key:
    """A key of the network: what a state means depends on it."""
    return Key(*args, **{"group": "Network", "resumable": False, **more})


SHARED_KEYS = {
    # What a key is worth where a config does not have it: the published setting for Gymnax's tasks.
    "ENV_NAME": environment(
        "MemoryChain-bsuite", "`<suite>/<name>`, or the name where one suite alone has it"
    ),
    "ENV_KWARGS": environment({}, "overrides of its parameters or constructor arguments"),
    "RESET_STRATEGY": environment(
        None,
        "`auto`, `optimistic` or `pool`; None: the suite's default",
        type=str,
        choices=("auto", "optimistic", "pool"),
    ),
    "RESET_RATIO": environment(16, "environments per world generated at a time", low=1),
    "BOOTSTRAP_TRUNCATED": environment(
        None, "whether a time limit is bootstrapped; None: by task", type=bool, resumable=True
    ),
    "TRIAL_CREDIT": environment(
        True,
        "in meta-RL, whether values and advantages run on to the next episode of a trial",
        resumable=True,
    ),
    "TRIAL_MEMORY": environment(
        True,
        "in meta-RL, whether memory and credit last for the trial; False: every episode's end ends"
        " both",
    ),
    "EPISODE_END": environment(
        "hidden",
        "what is seen of an episode's end within a trial: `hidden`, nothing; `beside`, the last"
        " observation beside the next first one; `step`, a step of its own",
        choices=("hidden", "beside", "step"),
    ),
    "PREV_ACTION_REWARD": environment(
        None,
        "whether observations hold the previous action and reward; None: in meta-RL",
        type=bool,
    ),
    "NORMALIZE_OBS": environment(False, "observations by their running mean and variance"),
    "NORMALIZE_REWARD": environment(
        False, "rewards by the running deviation of discounted returns"
    ),
    "TOTAL_TIMESTEPS": Key(10_000_000, "environment steps, of all environments together", low=1),
    "NUM_ENVS": Key(512, "environments, over all devices", low=1, resumable=False),
    "NUM_STEPS": Key(128, "steps of each environment per rollout", low=1, resumable=False),
    "NUM_MINIBATCHES": Key(8, "minibatches per pass, each of whole environments", low=1),
    "LR": Key(2e-4, "learning rate of Adam", low=0, traced=True),
    "ANNEAL_LR": Key(True, "linear decay to 0 over the run"),
    "GAMMA": Key(0.99, "discount per step", low=0, high=1, traced=True),
    "NETWORK": network(
        "published",
        "what stands around the transformer where ENCODER, SKIP and HEADS are None: `published`,"
        " or `wide`: `features`, True and `residual`",
        choices=("published", "wide"),
    ),
    "ENCODER": network(
        None,
        "`linear`: one dense layer over the observation; `features`: grid and vector apart, with"
        " norms; None: by NETWORK",
        type=str,
        choices=("linear", "features"),
    ),
    "SKIP": network(
        None,
        "whether actor and critic read the encoder's features beside the transformer's output;"
        " None: by NETWORK",
        type=bool,
    ),
    "HEADS": network(
        None,
        "actor and critic: `mlp` of two layers, or `residual` with norms; None: by NETWORK",
        type=str,
        choices=("mlp", "residual"),
    ),
    "encoder_features": network(
        512, "numbers that ENCODER=features makes of a grid; a fourth of that of all else", low=4
    ),
    "ACTIVATION": network(
        "relu",
        "of the hidden layers of HEADS=mlp: `relu` or `tanh`",
        choices=("relu", "tanh"),
    ),
    "MEMORY": network(
        "transformer",
        "`transformer`; `gru`, of as many layers; `none`: actor and critic on the encoder alone",
        choices=("transformer", "gru", "none"),
    ),
    "EMBED_SIZE": network(256, "width of the transformer's stream, even", low=1),
    "qkv_features": network(256, "width of queries, keys and values, all heads together", low=1),
    "num_heads": network(8, "attention heads, divides `qkv_features`", low=1),
    "num_layers": network(2, "layers that remember; MEMORY=none has 0", low=0),
    "hidden_layers": network(256, "width of the actor's and the critic's hidden layers", low=1),
    "WINDOW_MEM": network(
        128,
        "steps that attention reaches back in each layer, 0 for none; MEMORY=gru has 1, its carry",
        low=0,
    ),
    "WINDOW_GRAD": network(
        64, "steps that a gradient flows through, divides `NUM_STEPS`", low=1, resumable=True
    ),
    "gating": network(True, "GTrXL's gates; False: residual sums"),
    "gating_bias": network(2.0, "initial bias of the gates: how closed they start"),
    "COMPUTE_DTYPE": network(
        "float32",
        "of matrix products: `float32` or `bfloat16`; all else is float32",
        choices=("float32", "bfloat16"),
        resumable=True,
    ),
    "seed": Key(
        0,
        "of parameters, environments and actions",
        "Run",
        low=0,
        high=2**32 - 1,
        resumable=False,
    ),
    "NUM_SEEDS": Key(
        1, "seeds trained at once under vmap, from `seed` on", "Run", low=1, resumable=False
    ),
    "RESULTS_DIR": Key(
        None,
        "where the run's folder is made; None: `runs/<suite>`",
        "Run",
        type=str,
        resumable=False,
    ),
    "CHECKPOINT_EVERY": Key(50, "updates between checkpoints", "Run", low=1),
    "KEEP_CHECKPOINTS": Key(2, "how many of the newest checkpoints are kept", "Run", low=1),
    "CHECKPOINT_KIND": Key(
        "full",
        "`full`, `learner` (parameters and optimiser) or `params`",
        "Run",
        choices=("full", "learner", "params"),
    ),
    "RESUME": Key(None, "folder of a run to go on with", "Run", type=str),
    "PARAMS": Key(None, "folder of a run whose parameters a new run starts from", "Run", type=str),
    "TRACK": Key(
        None,
        "`wandb` or `tensorboard`; None: neither",
        "Run",
        type=str,
        choices=("wandb", "tensorboard"),
    ),
}
"""The settings that any algorithm has."""

ADVANTAGE_FLOOR = Key(
    0.0,
    "least deviation that advantages are divided by, in root mean squares of the returns",
    low=0,
    traced=True,
)
"""Of the algorithms that divide advantages by their deviation."""

NETWORKS = {
    "published": {"ENCODER": "linear", "SKIP": False, "HEADS": "mlp"},
    "wide": {"ENCODER": "features", "SKIP": True, "HEADS": "residual"},
}
"""What stands around the transformer, by the value of NETWORK."""

MEMORIES = {
    "transformer": {},
    "gru": {"WINDOW_MEM": 1},
    "none": {"WINDOW_MEM": 0, "num_layers": 0},
}
"""What is kept of the steps before, by the value of MEMORY, whatever else a config asks for."""

LAUNCH_KEYS = {
    "COORDINATOR": Key(
        None, "`host:port` of process 0, a free port there; None under SLURM", "Run", type=str
    ),
    "NUM_PROCESSES": Key(None, "how many processes", "Run", type=int, low=1),
    "PROCESS_ID": Key(None, "which one this is, from 0", "Run", type=int, low=0),
    "CONNECT_TIMEOUT": Key(300, "seconds to wait until all are there", "Run", low=1),
    "HEARTBEAT_TIMEOUT": Key(
        20, "seconds without a sign of life until a process counts as dead", "Run", low=1
    ),
}
"""The settings of one process of several, which are not the run's."""


def with_shared(own: Keys) -> dict[str, Key]:
    """An algorithm's whole table: the shared keys and its own, group by group."""
    keys = {**SHARED_KEYS, **own}
    return {name: key for group in GROUPS for name, key in keys.items() if key.group == group}


def defaults(keys: Keys) -> dict[str, Any]:
    """What every key is worth where a config does not have it."""
    return {name: key.default for name, key in keys.items()}
