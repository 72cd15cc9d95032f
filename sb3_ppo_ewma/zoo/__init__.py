"""
PPO-EWMA and PPG in rl-zoo3: ``python -m sb3_ppo_ewma.zoo SCRIPT ...`` runs the zoo's scripts, :func:`register` adds
the algorithms to rl-zoo3 in your own script.

Importing this module imports neither rl_zoo3 nor any environment; calling its two functions does.
"""

from sb3_ppo_ewma.zoo.command_line import main

__all__ = ["main", "register"]


def register() -> None:
    """
    Add our algorithms to rl-zoo3 under the names in ``zoo.algorithms``, and sb3-contrib's ``MaskablePPO`` as
    ``ppo_mask``, with their hyper-parameters, Optuna search spaces and converters, and our features extractors by name.
    Evaluate masked algorithms with the masks of their environments. If MinAtar is installed, register its games with
    gymnasium. Apply :mod:`sb3_ppo_ewma.zoo.patches`, repairs of rl-zoo3 that all its algorithms profit from.

    Call it before the zoo builds its argument parser. A second call changes nothing.

    :raises ImportError: without rl_zoo3, with the command that installs it
    """
    try:
        from sb3_ppo_ewma.zoo import registration
    except ModuleNotFoundError as error:
        from sb3_ppo_ewma.zoo.command_line import explain

        raise ImportError(explain(error)) from error
    registration.register()
