"""
Repairs of rl_zoo3, and of SB3, sb3-contrib, Optuna and the Hugging Face libraries as it uses them, one module per
upstream defect.

Each module names its defect, the version it was seen in and the upstream source or issue. It has two functions:
``is_needed()`` checks whether the installed version has the defect, ``apply()`` repairs it. When upstream fixes a
defect, the test of that name in ``tests/test_zoo_patches.py`` fails: delete the module and the test.

Features of this package that hook into the zoo are not here but in the modules beside this folder.
"""

import contextlib
import functools
from collections.abc import Iterator

from sb3_ppo_ewma.zoo.patches import (
    action_masker,
    bare_words,
    checkpoint_statistics,
    child_commands,
    class_names,
    constructor_errors,
    continued_statistics,
    dead_trials,
    dotted_names,
    env_kwargs,
    failed_run_folder,
    ffmpeg_status,
    generate_metadata,
    hub_missing_file,
    ignored_options,
    integer_options,
    journal_lock,
    missing_trial,
    no_completed_trial,
    observation_spaces,
    policy_kwargs,
    policy_names,
    python_config,
    saved_objects,
    schedule_none,
    search_run_folder,
    search_unknown_hyperparams,
    shared_run_folder,
    strict_yaml,
    torn_journal,
    trial_normalization,
    trial_zero,
    unchecked_entry,
    unequal_runs,
    unfound_runs,
    unregistered_env,
    unsafe_yaml,
    vec_normalize_save,
)

# Where several replace the same function, a later one calls the earlier ones.
PATCHES = (
    action_masker,
    unregistered_env,
    bare_words,
    schedule_none,
    strict_yaml,
    missing_trial,
    trial_normalization,  # after missing_trial: the trial exists
    trial_zero,
    env_kwargs,
    policy_kwargs,  # after trial_zero: it prepares what that one merges
    continued_statistics,  # after trial_normalization: an agent that is continued belongs to no trial
    checkpoint_statistics,
    unchecked_entry,  # after those that complete the entry
    ignored_options,
    search_unknown_hyperparams,
    shared_run_folder,
    failed_run_folder,  # after the two before it: it removes the folder that one created, if the other refuses the run
    search_run_folder,
    constructor_errors,
    no_completed_trial,
    class_names,
    dotted_names,
    observation_spaces,
    policy_names,
    python_config,
    saved_objects,  # after python_config, which makes more objects savable
    journal_lock,
    torn_journal,
    dead_trials,
    vec_normalize_save,
    generate_metadata,
    hub_missing_file,
)
# These replace functions of the standard library and others, so they apply only while a script of the zoo runs. The
# last three check its arguments, in this order.
SCRIPT_PATCHES = (child_commands, ffmpeg_status, unsafe_yaml, integer_options, unfound_runs, unequal_runs)


@functools.cache  # once
def apply_patches() -> None:
    """Apply the patches that the installed versions need. A second call changes nothing."""
    for patch in PATCHES:
        if patch.is_needed():
            patch.apply()


@contextlib.contextmanager
def script_patches() -> Iterator[None]:
    """Within the context, apply the patches of functions that the zoo's scripts call in other libraries."""
    with contextlib.ExitStack() as stack:
        for patch in SCRIPT_PATCHES:
            if patch.is_needed():
                stack.enter_context(patch.apply())
        yield
