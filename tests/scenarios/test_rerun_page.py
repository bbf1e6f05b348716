"""The commands of docs/rerun.md, one after the other, in a project whose last run was killed."""

from typing import TYPE_CHECKING

import page
from chain import Chain

if TYPE_CHECKING:
    from conftest import Reference


def test_its_commands_can_be_pasted(finished: Chain, server: str, reference: "Reference") -> None:
    chain = finished.at(server)
    chain.set("card.contact", "somebody")
    running = chain.start("run")
    assert running.kill_stage("card", 0.1)
    assert running.end().code == 1
    commands = [command for block in page.blocks("rerun") for command in block]
    assert commands == [
        ["overnight", "runs"],
        ["overnight", "status"],
        ["overnight", "rerun"],
        ["overnight", "rerun", "--from", "evaluate", "--force"],
    ]
    said = []
    for _, *arguments in commands:
        ended = chain.overnight(*arguments)
        assert ended.code == 0, ended.err
        said.append(ended)
    fields = said[0].out.splitlines()[-1].split("\t")
    assert (fields[2], fields[3]) == ("failed", "card")
    assert said[1].out.splitlines()[-1].startswith("card: failed: its process was killed by SIGKILL")
    assert (said[2].outcomes()["evaluate"], said[2].outcomes()["card"]) == ("cached", "ran")
    repeated = said[3].outcomes()
    assert [stage for stage, outcome in repeated.items() if outcome == "ran"] == ["evaluate", "card"]
    # Three attempts at one run.
    assert chain.overnight("runs").out.count("\n") == said[0].out.count("\n")
    evaluation = "models/evaluation.json"
    assert chain.version()[evaluation] == reference.version[evaluation]
