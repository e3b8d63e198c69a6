"""Covering arrays: few cases among which any two, or three, axes meet in every combination of their values."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def covering_array(axes: Mapping[str, Sequence[Any]], strength: int, seed: int = 0) -> list[dict[str, Any]]:
    """Cases, always alike, so that each choice of values for each `strength` axes is in one of them.

    Greedy: a case starts from a combination that is still missing; every other axis, the longest first, takes the
    value that covers most of what is missing.
    """
    names = sorted(axes, key=lambda name: -len(axes[name]))
    groups = list(itertools.combinations(names, strength))
    groups_of = {name: [group for group in groups if name in group] for name in names}
    places = {name: range(len(axes[name])) for name in names}
    missing = {(group, at) for group in groups for at in itertools.product(*(places[name] for name in group))}
    draw = random.Random(seed)
    starts = sorted(missing)
    draw.shuffle(starts)
    cases = []
    for start in starts:
        if start not in missing:
            continue
        case = dict(zip(*start, strict=True))
        for name in names:
            if name not in case:
                ready = [group for group in groups_of[name] if all(other in case or other == name for other in group)]

                def gain(place: int, name: str = name, ready: Any = ready, case: dict[str, int] = case) -> int:
                    tried = {**case, name: place}
                    return sum((group, tuple(tried[other] for other in group)) in missing for group in ready)

                case[name] = max(draw.sample(places[name], len(places[name])), key=gain)
        missing.difference_update((group, tuple(case[name] for name in group)) for group in groups)
        cases.append({name: axes[name][case[name]] for name in axes})
    return cases
