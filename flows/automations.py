"""Puts the automations of ``deployments/automations.yaml`` on a Prefect server: ``python -m flows.automations``."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.types import SecretDict

from flows import project, server
from tasks.errors import TryAgain, UserMistake
from tasks.notice_params import NoticeParams
from tasks.section import read_yaml

FILE = Path("deployments") / "automations.yaml"
BLOCK = "overnight-webhook"
_PLACEHOLDER = "WEBHOOK"


def install(client: SyncPrefectClient, root: Path, params: NoticeParams) -> list[str]:
    """Creates or brings up to date the project's automations; returns the names of those that are installed.

    Those that send are left out, and removed, while the environment holds no webhook. Whether one is switched on, and
    through which block of somebody's own it sends, stays as that was set on the server.
    """
    url = os.environ.get(params.webhook_env, "")
    # Read back by the server when it sends; there it is encrypted, and masked wherever it is shown.
    block = str(_save_block(url)) if url else None
    installed = []
    for content in read_yaml(root / FILE)["automations"]:
        known = client.read_automations_by_name(content["name"])
        filled = _fill(content, (known and _chosen(client, known[0])) or block)
        if filled is None:
            for automation in known:
                client.delete_automation(automation.id)
            continue
        installed.append(content["name"])
        if not known:
            client.create_automation(AutomationCore.model_validate(filled))
            continue
        wanted = AutomationCore.model_validate({**filled, "enabled": known[0].enabled})
        # A server takes a moment to act by a changed one; what happens meanwhile would pass unnoticed.
        if _plain(wanted) != _plain(known[0]):
            client.update_automation(known[0].id, wanted)
    return installed


def _chosen(client: SyncPrefectClient, known: AutomationCore) -> str | None:
    """Returns the block through which ``known`` sends, where somebody has put one in the place of ours."""
    for action in known.actions:
        if isinstance(action, SendNotification):
            with contextlib.suppress(ObjectNotFound):
                if client.read_block_document(action.block_document_id, include_secrets=False).name != BLOCK:
                    return str(action.block_document_id)
    return None


def _plain(automation: AutomationCore) -> dict[str, Any]:
    fields = automation.model_dump(mode="json", include=set(AutomationCore.model_fields))
    # Given by the server.
    fields["trigger"].pop("id", None)
    return fields


def _fill(content: dict[str, Any], block: str | None) -> dict[str, Any] | None:
    """Returns the automation with the block's id in place, or None when it needs a block and there is none."""
    actions = []
    for action in content["actions"]:
        if action.get("block_document_id") == _PLACEHOLDER:
            if block is None:
                return None
            action = {**action, "block_document_id": block}
        actions.append(action)
    return {**content, "actions": actions}


def _save_block(url: str) -> Any:
    block = CustomWebhookNotificationBlock(
        name="overnight",
        # Its field `url` is shown to everybody on the server; its secrets are not.
        url="{{url}}",
        json_data={"text": "{{subject}}\n{{body}}"},
        headers=None,
        cookies=None,
        secrets=SecretDict({"url": url}),
    )
    return block.save(BLOCK, overwrite=True)


def main() -> int:
    """Installs them from the project in the current folder; returns the exit code: 0, or that of what it tells."""
    try:
        here = project.find()
        if (url := get_current_settings().api.url) is None:
            raise UserMistake("PREFECT_API_URL is not set. Set it to the server's, such as http://127.0.0.1:4200/api.")
        server.check(url)
        with get_client(sync_client=True) as prefect:
            for name in install(prefect, here, project.committed(here).notice):
                print(name)
    except (UserMistake, TryAgain) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
