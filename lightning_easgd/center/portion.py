"""What one link exchanges of a center: fragments, cohort by cohort.

[Note: portions] A sum that takes long may be in flight while others come and go. So each link has
fragments of its own: when their cohorts join, and the memory that their sums travel in, depends on
nothing that another link does. A worker may wait for one link sooner than other workers do, as
before a validation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_easgd.center.flat import FlatVector, Memory
from lightning_easgd.center.fragments import Fragment
from lightning_easgd.center.names import listed
from lightning_easgd.center.sums import Sums
from lightning_easgd.schedules import Often

Named = Sequence[tuple[str, nn.Parameter]]


class Portion:
    """The fragments that one link exchanges, and how many cohorts of them take part.

    Args:
        fragment_count: into how many fragments each cohort is cut, one of which an exchange moves.
    """

    def __init__(self, fragment_count: int) -> None:
        self.fragment_count = fragment_count

    def begin(self, memory: Memory) -> None:
        """Begin anew without fragments, whose sums lie in ``memory``."""
        self.cohorts: list[list[Fragment]] = []
        """Fragments of each cohort; those of a cohort that waits to join, too."""
        self.joined = 0
        """How many cohorts take part in exchanges."""
        self._sums = Sums(memory)

    def join(self, cohorts: int) -> None:
        """Let the first ``cohorts`` cohorts take part in exchanges from now on."""
        self.joined = cohorts

    def open(self, index: int) -> list[Fragment]:
        """The fragments that are exchanged at this index, with memory for their sums.

        Nothing may be in flight.
        """
        fragments = self.fragments(index, self.joined)
        self._sums.provide(fragments)
        return fragments

    def fragments(self, index: int, joined: int) -> list[Fragment]:
        """Those of the first ``joined`` cohorts that are exchanged at this index."""
        return [cohort[index] for cohort in self.cohorts[:joined] if index < len(cohort)]

    def those_of(self, cohorts: int) -> Iterator[Fragment]:
        """All fragments of the first ``cohorts`` cohorts."""
        for cohort in self.cohorts[:cohorts]:
            yield from cohort

    @property
    def nbytes(self) -> int:
        """Of the center's values, those of cohorts that wait to join, too."""
        fragments = self.those_of(len(self.cohorts))
        return sum(part.nbytes for fragment in fragments for part in fragment.center.parts)

    def fingerprint(self, cohorts: int, index: int = 0) -> int:
        """A hash of the first ``cohorts`` cohorts' names and shapes and the index, in 56 bits."""
        value = index
        for fragment in self.those_of(cohorts):
            value = (value * 1_000_003 + fragment.layout.fingerprint) % 2**56
        return value

    def checksum(self) -> int:
        """A sum over the bits of the center's values that take part, within 63 bits."""
        elastic = self.those_of(self.joined)
        return sum(fragment.center.checksum() for fragment in elastic) % 2**63

    def reset_worker(self) -> None:
        """Let the weights that take part go on from the center, without the rule's momentum."""
        for fragment in self.those_of(self.joined):
            fragment.center.write_to(fragment.tensors())
            fragment.forget_rule_state()

    def provide_vectors(self) -> Sequence[tuple[Fragment, FlatVector]]:
        """Memory for the values of all fragments: that of the sums, none of which is in flight."""
        fragments = list(self.those_of(len(self.cohorts)))
        self._sums.provide(fragments)
        return [(fragment, fragment.total) for fragment in fragments]

    def release_sums(self) -> None:
        """Let go of memory that is larger than exchanges need."""
        if self.fragment_count > 1:
            self._sums.release()


def parted(named: Named, often: Often | None) -> list[Named]:
    """Parameters that are exchanged every τ steps and, if there are any, those exchanged often."""
    if often is None:
        return [named]
    chosen = [often.includes(name, parameter.numel()) for name, parameter in named]
    pairs = list(zip(named, chosen, strict=True))
    return [[pair for pair, is_often in pairs if is_often is wanted] for wanted in (False, True)]


def require_both(module: nn.Module, named: Named, often: Often) -> None:
    """Refuse to exchange all parameters often, or none.

    Args:
        module: whose parameters patterns name.
        named: parameters that take part from the start.
        often: which of them are exchanged often.

    Raises:
        ValueError: all are, or none, or a pattern names no parameter.
    """
    known = [name for name, _ in module.named_parameters()]
    kind = type(module).__name__
    for pattern in often.names:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"often={often} names no parameter of {kind}: '{pattern}' matches none of"
                f" {listed(known)}. Correct it, or leave it out."
            )
    main, small = parted(named, often)
    if not (main and small):
        sizes = sorted(parameter.numel() for _, parameter in named)
        raise ValueError(
            f"often={often} takes in {'none' if main else 'all'} of the parameters that {kind}"
            f" trains, which have {sizes[0]} to {sizes[-1]} elements. Let `below` lie in between,"
            f" for example below={sizes[-1]}, or leave often out and set tau alone."
        )
