"""
A process that is killed while it has the lock of a journal leaves it for ever if the path of ``--storage`` is relative:
every later process of the search waits without end, and without a pause.

Seen in Optuna 5.0. ``JournalFileSymlinkLock`` makes a symbolic link with that path as its target, which is then looked
for in the folder of the link, and takes the age of what it points to for the age of the lock. Source:
https://github.com/optuna/optuna/blob/master/optuna/storages/journal/_file.py.
"""

import os
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from sb3_ppo_ewma.zoo.journal import JournalLock
from sb3_ppo_ewma.zoo.patches._replace import AnyFunction, replace_function, upstream_source


def is_needed() -> bool:
    """:return: whether upstream looks at the age of what the lock points to, by a path that may be relative"""
    sources = upstream_source(JournalFileSymlinkLock.__init__) + upstream_source(JournalFileBackend.__init__)
    return "os.stat(self._lock_file)" in upstream_source(JournalFileSymlinkLock.acquire) and "abs" not in sources


def apply() -> None:
    """Use a lock that can tell whether its process is alive, unless another one is given."""
    replace_function(JournalFileBackend, "__init__", _init)


def _init(upstream: AnyFunction, backend: Any, file_path: str, lock_obj: Any = None) -> None:
    file_path = os.path.abspath(file_path)
    upstream(backend, file_path, lock_obj or JournalLock(file_path))
