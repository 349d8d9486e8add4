"""The algorithms of this repository by the name that a saved config has."""

from config import ConfigError
from learning import Algorithm
from trainer_Muesli_trXL import MUESLI
from trainer_PPO_trXL import PPO

ALGORITHMS = {algorithm.name: algorithm for algorithm in (PPO, MUESLI)}


def resolve_algorithm(name: str, given: Algorithm | None = None) -> Algorithm:
    """The algorithm that a run was trained with.

    Args:
      name: as it stands in the saved config.
      given: one of the user's own.

    Raises:
      ConfigError: the run was trained with another one, or with one that isn't known here.
    """
    if given is not None and given.name != name:
        raise ConfigError(f"the run was trained by {name}, not by {given.name}")
    if given is None and name not in ALGORITHMS:
        raise ConfigError(
            f"the run was trained by {name}, which is none of {', '.join(ALGORITHMS)}; give it as"
            " the argument `algorithm`"
        )
    return given or ALGORITHMS[name]
