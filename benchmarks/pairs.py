"""Sides that are measured in turn, so that a machine that slows down slows all of them: medians, ratios by round."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping


def in_turns(sides: Mapping[str, Callable[[], float]], rounds: int) -> Iterator[dict[str, list[float]]]:
    """Measures each of ``sides`` once a round; yields after each what has been measured so far."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            measured[name].append(side())
        yield measured


def compare(
    sides: Mapping[str, Callable[[], float]],
    rounds: int,
    unit: str,
    goals: Mapping[str, float],
    ours: str,
    also: Mapping[str, object] | None = None,
) -> None:
    """Measures each of ``sides`` once a round and prints medians, then a JSON line with the ratios of ``ours`` to each.

    A side returns a rate in ``unit``; more is better. ``goals`` names the ratio to reach against a side. The JSON line
    begins with what ``also`` holds in the end.
    """
    measured: dict[str, list[float]] = {}
    for round_, measured in enumerate(in_turns(sides, rounds), 1):
        print(f"round {round_}/{rounds}: " + "  ".join(f"{name} {rates[-1]:,.0f}" for name, rates in measured.items()))
    print(f"\n{'side':<44}{unit:>16}   ours/side: median (least to most)   goal")
    results: dict[str, object] = {**(also or {}), "unit": unit, "rounds": rounds}
    for name, rates in measured.items():
        ratios = [mine / theirs for mine, theirs in zip(measured[ours], rates, strict=True)]
        median = statistics.median(ratios)
        goal = f"at least {goals[name]:g}" if name in goals else ""
        spread = f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:<44}{statistics.median(rates):>16,.0f}   {spread}   {goal}")
        results[name] = round(statistics.median(rates), 1)
        if name != ours:
            results[f"{ours} / {name}"] = round(median, 3)
            if name in goals:
                results[f"goal: {ours} / {name}"] = goals[name]
    print(json.dumps(results))
