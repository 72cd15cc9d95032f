"""What becomes of a fault."""

from typing import Literal, NamedTuple

# "recovered": all goes on as without the fault; "refused": with an error that names the cause (file, parameter);
# "silent": wrong, but nobody was told; "unclear": an error that does not name the cause; "lost": an agent or a study
# that was there is no longer usable; "left": a file, a lock or a process stayed behind.
Verdict = Literal["recovered", "refused", "silent", "unclear", "lost", "left"]
GOOD: tuple[Verdict, ...] = ("recovered", "refused")


class Outcome(NamedTuple):
    """
    :param kind: of the fault, such as "kept rollouts: a bit flipped"
    :param verdict: what became of it
    :param detail: the case and the message, to reproduce it
    """

    kind: str
    verdict: Verdict
    detail: str
