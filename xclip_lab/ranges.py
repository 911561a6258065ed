"""Numbers with a range, for config dataclasses. To a type checker they are plain numbers; jsonargparse, which
builds the configs, checks the ranges."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    PositiveInt = int
    NonNegativeInt = int
    PositiveFloat = float
    NonNegativeFloat = float
    ClosedUnitInterval = float
    UnitIntervalBelowOne = float
    Seed = int
else:
    from jsonargparse.typing import (
        ClosedUnitInterval,
        NonNegativeFloat,
        NonNegativeInt,
        PositiveFloat,
        PositiveInt,
        restricted_number_type,
    )

    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
    UnitIntervalBelowOne = restricted_number_type("UnitIntervalBelowOne", float, [(">=", 0), ("<", 1)])

__all__ = [
    "ClosedUnitInterval",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "Seed",
    "UnitIntervalBelowOne",
]
