"""The files of deployments/: what Prefect itself reads is checked with its own models, the rest with typed ones."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML

from flows import automations, supervise

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "deployments"
POOLS = ("process", "docker", "kubernetes")
# What prefect-docker knows (0.7.4 does), and the list that comes with Prefect lacks.
LATER = {"docker": {"container_create_kwargs"}}


def _read(name: str) -> Any:
    return YAML(typ="safe", pure=True).load(FOLDER / name)


def test_prefect_yaml_holds_to_prefects_own_schema_and_to_every_key_of_it() -> None:
    from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel

    content = _read("prefect.yaml")
    model = PrefectYamlModel.model_validate(content)
    assert [one.name for one in model.deployments] == ["nightly-full", "weekly-scratch", "on-new-data"]
    # Prefect passes over keys that it does not know, so a misspelt one would go unnoticed.
    for deployment in content["deployments"]:
        assert set(deployment) <= set(DeploymentConfig.model_fields)


def test_every_deployment_runs_one_night_at_a_time_in_the_pool_overnight() -> None:
    for deployment in _read("prefect.yaml")["deployments"]:
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
        assert deployment["work_pool"] == {"name": "overnight"}
        assert deployment["entrypoint"] == "flows.nightly.nightly"


def test_the_folder_of_whoever_deploys_is_not_written_into_a_deployment() -> None:
    content = _read("prefect.yaml")
    [step] = content["pull"]
    assert step == {"prefect.deployments.steps.set_working_directory": {"directory": "{{ $OVERNIGHT_PROJECT }}"}}
    assert not any("pull" in deployment for deployment in content["deployments"])


@pytest.mark.parametrize("pool", POOLS)
def test_a_work_pool_asks_only_for_what_workers_of_its_type_know(pool: str) -> None:
    import prefect.server.api.collections as collections

    views = Path(collections.__file__).parent / "collections_data" / "views" / "aggregate-worker-metadata.json"
    known = next(
        types[pool]["default_base_job_configuration"]
        for types in json.loads(views.read_text()).values()
        if pool in types
    )
    ours = json.loads((FOLDER / "pools" / f"{pool}.json").read_text())
    assert set(ours["job_configuration"]) <= set(known["job_configuration"]) | LATER.get(pool, set())
    # `name`, `command` and `labels` are what a worker fills in for each run.
    assert {"name", "command", "labels", "env"} <= set(ours["variables"]["properties"])
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(ours["job_configuration"])))
    assert used == set(ours["variables"]["properties"])


@pytest.mark.parametrize("pool", ["docker", "kubernetes"])
def test_what_a_container_has_of_its_machine_is_set_in_the_pool(pool: str) -> None:
    variables = json.loads((FOLDER / "pools" / f"{pool}.json").read_text())["variables"]["properties"]
    assert {"image", "gpus", "shared_memory", "env"} <= set(variables)
    assert {"memory", "mem_limit"} & set(variables)


@pytest.mark.parametrize("pool", POOLS)
def test_a_run_in_a_pool_sends_heartbeats_and_finds_the_project(pool: str) -> None:
    environment = json.loads((FOLDER / "pools" / f"{pool}.json").read_text())["variables"]["properties"]["env"][
        "default"
    ]
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    # A process inherits the name of the project from its worker; a container has it mounted.
    projects = {"process": None, "docker": "/srv/overnight", "kubernetes": "/project"}
    assert environment.get("OVERNIGHT_PROJECT") == projects[pool]


def test_the_automations_are_what_prefect_takes_once_the_block_is_filled_in() -> None:
    from prefect.events.schemas.automations import AutomationCore

    block = "00000000-0000-4000-8000-000000000000"
    filled = [automations._fill(content, block) for content in _read("automations.yaml")["automations"]]
    models = [AutomationCore.model_validate(content) for content in filled]
    assert [model.enabled for model in models] == [True, True, False]
    without = [automations._fill(content, None) for content in _read("automations.yaml")["automations"]]
    assert [content is None for content in without] == [True, False, True]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HealthCheck(_Strict):
    test: list[str]
    interval: str
    timeout: str
    retries: int


class Condition(_Strict):
    condition: str


class Build(_Strict):
    context: str
    dockerfile: str


class Service(_Strict):
    """A service as the compose specification names its keys; one that is not listed here is not used."""

    image: str
    build: Build | None = None
    command: str | None = None
    user: str | None = None
    restart: str
    environment: dict[str, str]
    volumes: list[str]
    ports: list[str] = []
    depends_on: dict[str, Condition] = {}
    healthcheck: HealthCheck | None = None
    stop_grace_period: str | None = None
    init: bool | None = None
    shm_size: str | None = None


class Compose(_Strict):
    name: str
    services: dict[str, Service]
    volumes: dict[str, None]


@pytest.fixture(scope="module")
def compose() -> Compose:
    return Compose.model_validate(_read("compose.yaml"))


def test_compose_starts_each_service_after_the_one_it_needs_is_well(compose: Compose) -> None:
    assert list(compose.services) == ["database", "server", "worker"]
    for service in compose.services.values():
        for needed, condition in service.depends_on.items():
            assert condition.condition == "service_healthy"
            assert compose.services[needed].healthcheck is not None
        named = {volume.split(":")[0] for volume in service.volumes if volume[0] not in "./$"}
        assert named <= set(compose.volumes)
    assert list(compose.services["worker"].depends_on) == ["server"]
    assert list(compose.services["server"].depends_on) == ["database"]


def test_a_run_that_is_told_to_end_is_not_killed_before_its_training_is(compose: Compose) -> None:
    job = json.loads((FOLDER / "pools/kubernetes.json").read_text())["job_configuration"]["job_manifest"]
    unit = re.search(r"^TimeoutStopSec=(\d+)$", (ROOT / "docs/schedule.md").read_text(), re.MULTILINE)
    assert unit is not None
    given = [
        float(str(compose.services["worker"].stop_grace_period).removesuffix("s")),
        job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"],
        float(unit[1]),
    ]
    # With what the kernel, the server and the last line take.
    assert min(given) >= supervise.STAGE_GRACE_SECONDS + 15


def test_a_container_has_the_clone_at_its_own_path(compose: Compose) -> None:
    docker = json.loads((FOLDER / "pools/docker.json").read_text())["variables"]["properties"]
    mounts = [*docker["volumes"]["default"], *compose.services["worker"].volumes]
    for mount in mounts:
        outside, inside = re.sub(r":\?[^}]*", "", mount).split(":")
        assert outside == inside
    assert compose.services["worker"].environment["OVERNIGHT_PROJECT"] == "${OVERNIGHT_PROJECT:?}"


def test_compose_listens_on_loopback_alone(compose: Compose) -> None:
    ports = [port for service in compose.services.values() for port in service.ports]
    assert ports == ["${OVERNIGHT_LISTEN:-127.0.0.1}:4200:4200"]


def test_the_pages_behind_a_proxy_with_tls_can_ask_at_its_address(compose: Compose) -> None:
    asked = compose.services["server"].environment["PREFECT_UI_API_URL"]
    # The whole of it: a proxy has another scheme and another port.
    assert asked == "${OVERNIGHT_ADDRESS:-http://127.0.0.1:4200}/api"
    assert "OVERNIGHT_ADDRESS=https://" in (FOLDER / "compose.yaml").read_text()


def test_compose_holds_no_secret_and_does_not_start_without_them(compose: Compose) -> None:
    server, worker = compose.services["server"].environment, compose.services["worker"].environment
    assert re.fullmatch(r"\$\{OVERNIGHT_AUTH:\?.*\}", server["PREFECT_SERVER_API_AUTH_STRING"])
    assert re.fullmatch(r"\$\{OVERNIGHT_AUTH:\?.*\}", worker["PREFECT_API_AUTH_STRING"])
    database = compose.services["database"].environment["POSTGRES_PASSWORD"]
    assert re.fullmatch(r"\$\{OVERNIGHT_DATABASE_PASSWORD:\?.*\}", database)
    values = [*server.values(), *worker.values()]
    assert not any(re.search(r"//[^/@:]*:[^$/@]*@", value) for value in values)


def test_compose_pins_its_images_and_prefect_to_the_locked_version(compose: Compose) -> None:
    locked = re.search(r"^prefect==(.*)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    assert compose.services["server"].image == f"prefecthq/prefect:{locked[1]}-python3.11"
    assert re.fullmatch(r"postgres:\d+\.\d+-\w+", compose.services["database"].image)
    worker = compose.services["worker"]
    assert worker.build is not None
    assert (FOLDER / worker.build.context / worker.build.dockerfile).is_file()
