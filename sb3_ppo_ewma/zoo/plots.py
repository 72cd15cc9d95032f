"""The plot of ``plot_train``: saved with ``-o``, and refused where there is nothing to see."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from sb3_ppo_ewma.zoo import options

# Backends of matplotlib that only write files; without a screen, it chooses the first
_WITHOUT_WINDOW = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}


@contextlib.contextmanager
def saved_or_shown() -> Iterator[None]:
    """
    Within the context, ``matplotlib.pyplot.show`` saves the figure if the option asks for it.

    :raises ValueError: if the figure shows no run
    """
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    show = pyplot.show

    def save_or_show() -> None:
        if not pyplot.gca().lines:
            raise ValueError(
                "there is nothing to plot: no run has as many episodes as the window, -w, or none has that value, -y"
            )
        if options.current.output is not None:
            pyplot.savefig(options.current.output)
            print(f"Saving to {options.current.output}")
            return
        if pyplot.get_backend().lower() in _WITHOUT_WINDOW:
            print("Note: there is no screen to show the plot on: save it with -o FILE")
        show()

    pyplot.show = save_or_show
    try:
        yield
    finally:
        pyplot.show = show
        pyplot.close()
