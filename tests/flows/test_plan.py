"""The plan as a table of cases over one graph:  a ─► b ─► d,  a ─► c ─► d."""

from pathlib import Path

import pytest

from flows.graph import Graph, Stage, in_order
from flows.plan import Action, collects, plan
from tasks.errors import UserMistake


def stage(name: str, *upstream: str) -> Stage:
    return Stage(name, "", upstream, (), (Path(name),))


DIAMOND = in_order([stage("d", "b", "c"), stage("c", "a"), stage("a"), stage("b", "a")])


def planned(stale: str, from_stage: str | None, force: bool) -> str:
    letters = {Action.RUN: "R", Action.CACHED: ".", Action.SKIPPED: "s"}
    steps = {step.stage.name: step for step in plan(DIAMOND, set(stale), from_stage, force)}
    return "".join("F" if steps[name].force else letters[steps[name].action] for name in "abcd")


@pytest.mark.parametrize(
    ("stale", "from_stage", "force", "expected"),
    [
        ("", None, False, "...."),
        ("a", None, False, "RRRR"),
        ("b", None, False, ".R.R"),
        ("d", None, False, "...R"),
        ("abcd", None, False, "RRRR"),
        ("", None, True, "FFFF"),
        ("", "collect", True, "FFFF"),
        # --from leaves upstream alone though it is stale, and does not by itself run what is unchanged.
        ("a", "b", False, "s..."),
        ("ab", "b", False, "sR.R"),
        ("abc", "d", False, "sss."),
        # Neither before nor after b: c runs because it is stale itself.
        ("c", "b", False, "s.RR"),
        ("", "b", True, "sF.F"),
        ("c", "b", True, "sFRF"),
        ("", "d", True, "sssF"),
        ("", "a", True, "FFFF"),
    ],
)
def test_plan(stale: str, from_stage: str | None, force: bool, expected: str) -> None:
    assert planned(stale, from_stage, force) == expected


def test_what_is_left_out_though_it_is_stale_or_what_it_reads_is_can_be_told() -> None:
    def left(stale: str, from_stage: str) -> str:
        steps = plan(DIAMOND, set(stale), from_stage)
        return "".join(sorted(step.stage.name for step in steps if step.stale))

    assert left("a", "d") == "abc"
    assert left("b", "d") == "b"
    assert left("ad", "b") == "a"
    assert left("bd", "b") == ""


def test_what_is_read_of_stages_that_are_left_out_has_to_be_there(tmp_path: Path) -> None:
    stages = [Stage(name, "", (before,) if before else (), (Path(before),), (Path(name),)) for before, name in
              (("", "a"), ("a", "b"), ("b", "c"))]  # fmt: skip
    graph = in_order(stages)
    (tmp_path / "a").touch()
    graph.check_there("b", tmp_path)
    graph.check_there("collect", tmp_path)
    with pytest.raises(UserMistake, match=r"^--from c: b is not there, which b makes\. .* take --from b, or leave"):
        graph.check_there("c", tmp_path)


def test_the_order_puts_each_stage_after_what_it_reads_and_else_keeps_that_of_the_file() -> None:
    assert [one.name for one in DIAMOND.stages] == ["a", "c", "b", "d"]


def test_an_unknown_stage_is_refused_with_the_list_of_those_there_are() -> None:
    with pytest.raises(UserMistake, match=r"^--from: there is no stage 'trian'; choose one of collect, a, c, b, d"):
        plan(DIAMOND, set(), "trian")


@pytest.mark.parametrize(("from_stage", "expected"), [(None, True), ("collect", True), ("a", False), ("d", False)])
def test_collecting_is_upstream_of_every_stage(from_stage: str | None, expected: bool) -> None:
    assert collects(from_stage) is expected


def test_an_empty_graph_plans_nothing() -> None:
    assert plan(Graph(()), set()) == ()
