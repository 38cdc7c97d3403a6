"""A policy for each user of a JupyterHub, by the groups that the hub knows.

    # jupyterhub_config.py
    import tfenv.jupyterhub

    c.Spawner.pre_spawn_hook = tfenv.jupyterhub.policy

The hub runs it before each server starts. It names the user's file in TFGPU_SITE_CONFIG, whose settings give way to
those of the user's own files and whose ceilings hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from typing import Any

from tfenv.identity import is_plain_name

#: Where the files are: `users/NAME.toml`, `groups/NAME.toml`, `default.toml`.
FOLDER = "/etc/tfgpu-hub"
_VARIABLE = "TFGPU_SITE_CONFIG"


def policy(spawner: Any) -> None:
    """Choose the policy of the user whose server is about to start, from the files in /etc/tfgpu-hub.

    Args:
        spawner: JupyterHub's spawner.
    """
    _set_policy(spawner, FOLDER, None)


def policy_from(folder: str, files: Collection[str] | None = None) -> Callable[[Any], None]:
    """Make a hook as `policy` for another folder, or for files that only the server can see.

    Args:
        folder: An absolute path, as the server sees it.
        files: The files that are there, as "groups/staff.toml". A hub cannot look into the container of a server.
            None: look.

    Raises:
        ValueError: The folder is no absolute path.
    """
    if not os.path.isabs(folder):
        raise ValueError(f'policy_from("{folder}"): write an absolute path, as in policy_from("{FOLDER}")')
    known = None if files is None else frozenset(files)
    return lambda spawner: _set_policy(spawner, folder, known)


def _set_policy(spawner: Any, folder: str, files: Collection[str] | None) -> None:
    for name in _list_candidates(spawner.user):
        path = os.path.join(folder, name)
        if os.path.lexists(path) if files is None else name in files:
            spawner.environment = {**spawner.environment, _VARIABLE: path}
            return
    # A server that is started again after its user's file was removed must not keep it.
    earlier = str(spawner.environment.get(_VARIABLE, ""))
    if earlier.startswith(os.path.join(folder, "")):
        spawner.environment = {key: value for key, value in spawner.environment.items() if key != _VARIABLE}
    spawner.log.warning("tfenv: %s has no policy: there is no default.toml in %s", spawner.user.name, folder)


def _list_candidates(user: Any) -> Iterator[str]:
    """List the files that may be a user's, the first wins. Of several groups it is the first by name."""
    names = [("users", user.name), *(("groups", name) for name in sorted(group.name for group in user.groups))]
    yield from (f"{kind}/{name}.toml" for kind, name in names if is_plain_name(name))
    yield "default.toml"
