"""
What a signal does to a training or a search of the zoo. As on Ctrl-C in the zoo, the agent is saved: at any moment, in
every kind of environments, also if their processes have ended, and before anything that may fail or take time. From the
end of training until the agent is saved, further signals wait.
"""

import functools
import multiprocessing
import signal
import threading
import traceback
from typing import Any

import optuna
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ppo_ewma.zoo import dead_trials, signals
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function

# Environments that hang are ended after so many seconds, when the agent is saved.
_SECONDS_TO_CLOSE = 10.0
_CALLBACK = f"{__name__}.StopOnSignal"


class StopOnSignal(BaseCallback):
    """Ends training where the error of a signal was lost, as Python loses those within ``__del__``, and in threads."""

    def _on_step(self) -> bool:
        if not signals.current.is_held:
            signals.current.check()
        return True


@functools.cache  # once
def install_hooks() -> None:
    """Let nothing that comes after training, or with a signal, lose an agent of an ``ExperimentManager``."""
    replace_function(ExperimentManager, "create_callbacks", _create_callbacks)
    replace_function(ExperimentManager, "learn", _learn)
    replace_function(ExperimentManager, "save_trained_model", _save_trained_model)
    replace_function(ExperimentManager, "objective", _objective)
    replace_function(ExperimentManager, "hyperparameters_optimization", _hyperparameters_optimization)


def _create_callbacks(upstream: AnyFunction, manager: Any) -> None:
    upstream(manager)
    if not signals.current.is_installed:
        return
    manager.callbacks.append(StopOnSignal())
    given = manager.specified_callbacks or []  # which every trial of a search makes anew
    manager.specified_callbacks = [*(given if isinstance(given, list) else [given]), _CALLBACK]


class _Learner:
    """
    Stands for the model in upstream's ``learn``, which then closes no environments.

    :param model: the model
    """

    def __init__(self, model: Any) -> None:
        self._model, self.policy = model, model.policy
        self.env = self
        self.is_over = self.was_stopped = False

    def learn(self, *args: Any, **kwargs: Any) -> None:
        """
        :param args: as of the model's method
        :param kwargs: as of the model's method
        :raises KeyboardInterrupt: if a signal has ended the training
        """
        try:
            with signals.current.once():
                self._model.learn(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            self.was_stopped = isinstance(error, KeyboardInterrupt) or signals.current.caused(error)
            self.is_over = self.was_stopped
            if isinstance(error, Exception) and self.was_stopped:
                raise KeyboardInterrupt from error
            raise
        finally:
            signals.current.is_held = False
        self.is_over = True

    def close(self) -> None:
        """Environments are closed later."""


def _learn(upstream: AnyFunction, manager: Any, model: Any) -> None:
    learner = _Learner(model)
    try:
        upstream(manager, learner)
    except (Exception, KeyboardInterrupt) as error:
        if not learner.is_over:
            _close(model.env)
            signals.current.release()
            raise
        _report("after training", error)
    if learner.was_stopped and signals.current.is_installed:
        signals.current.to_close = model.env
    else:
        _close(model.env)


def _save_trained_model(upstream: AnyFunction, manager: Any, model: Any) -> None:
    try:
        with signals.output_may_be_lost(lambda: True):
            upstream(manager, model)
    except BaseException:
        signals.current.has_failed = True
        raise
    finally:
        env, signals.current.to_close = signals.current.to_close, None
        _close(env)
        signals.current.release()


def _close(env: Any) -> None:
    """
    Close environments. Nothing that happens meanwhile is an error: they may have ended before.

    :param env: environments; ``None``: there are none
    """
    if env is None:
        return
    watchdog = threading.Timer(_SECONDS_TO_CLOSE, _end_children)
    watchdog.daemon = True
    if signals.current.received is not None:
        watchdog.start()
    try:
        with signals.current.once():
            env.close()
    except (Exception, KeyboardInterrupt) as error:
        _report("while the environments were closed", error)
    finally:
        watchdog.cancel()


def _report(when: str, error: BaseException) -> None:
    if signals.current.received is None and not isinstance(
        error, EOFError | KeyboardInterrupt
    ):  # an EOFError as upstream
        signals.say(f"An error {when}, which loses nothing:\n{''.join(traceback.format_exception(error))}")


def _end_children() -> None:
    for process in multiprocessing.active_children():
        process.kill()


def _objective(upstream: AnyFunction, manager: Any, trial: optuna.Trial) -> float:
    signals.current.check()
    try:
        return float(upstream(manager, trial))
    except (Exception, KeyboardInterrupt) as error:
        is_stopped = isinstance(error, KeyboardInterrupt) or signals.current.caused(error)
        if not is_stopped and signals.current.received is None:
            raise
        if signals.current.received not in (None, signal.SIGINT):  # the machine wants it, not the user
            dead_trials.retry(trial.study, trial.number)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from error


def _hyperparameters_optimization(upstream: AnyFunction, manager: Any) -> None:
    with signals.output_may_be_lost(lambda: signals.current.received is not None):
        try:
            upstream(manager)
        except ValueError as error:  # there may be nothing to report yet
            if signals.current.received is None:
                raise
            print(error)
