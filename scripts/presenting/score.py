"""What a test found, in the words of a reader: accuracy, bits per byte, or a number by its name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A number that tests find, as it is stored, and as it is shown."""

    name: str
    lower_is_better: bool = False
    unit: str = ""
    """Of a value; a share of 1 is shown in %."""
    difference: str = ""
    """The unit of a difference between two values."""
    digits: int = 3

    @property
    def scale(self) -> float:
        """What is shown for 1."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def axis(self) -> str:
        """Of curves: with accuracy it is the error that is drawn."""
        return "test error in %" if self.unit == "%" else self.name

    def shown(self, value: float) -> str:
        """A value with its unit."""
        return f"{self.scale * value:.{self.digits}f} {self.unit}".rstrip()

    def goal(self, value: float) -> str:
        """A target, as briefly as it was given."""
        return f"{self.scale * value:g} {self.unit} {self.name}".replace("  ", " ")

    def gain(self, value: float, other: float) -> float:
        """By how much a value is better than another, as it is shown; below 0: worse."""
        return self.scale * (other - value if self.lower_is_better else value - other)

    def cost(self, value: float) -> float:
        """The value, so that less is better."""
        return value if self.lower_is_better else -value

    def drawn(self, value: float) -> float:
        """What is drawn for a value."""
        return 100 * (1 - value) if self.unit == "%" else value


def score_of(metric: str, *, lower_is_better: bool) -> Score:
    """The score that a metric's name and direction say."""
    name = metric.split("/")[-1]
    if "acc" in name and not lower_is_better:
        return Score("test accuracy", unit="%", difference="points", digits=2)
    if "bits" in name or "bpb" in name:
        return Score("bits per byte", lower_is_better, difference="bits per byte")
    return Score(name, lower_is_better, difference=f"of {name}")
