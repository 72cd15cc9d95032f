"""
PPO-EWMA and PPG in rl-zoo3: ``python -m sb3_ppo_ewma.zoo SCRIPT ...`` runs the zoo's scripts, :func:`register` makes a
script of one's own know the algorithms.

Importing this module imports neither rl_zoo3 nor any environment; the two functions do.
"""

from sb3_ppo_ewma.zoo.command_line import main

__all__ = ["main", "register"]


def register() -> None:
    """
    Make rl-zoo3 know ``ppo_ewma``, ``ppo_lstm_ewma``, ``ppg`` and ``ppg_ewma``, with their hyper-parameters, Optuna
    search spaces and converters, and our features extractors by name; and gymnasium the MinAtar games where they are
    installed. Call it before the zoo builds its argument parser; a second call changes nothing.

    :raises ImportError: without rl_zoo3, with the command that installs it
    """
    try:
        from sb3_ppo_ewma.zoo import registration
    except ModuleNotFoundError as error:
        from sb3_ppo_ewma.zoo.command_line import explain

        raise ImportError(explain(error)) from error
    registration.register()
