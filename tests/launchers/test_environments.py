"""Random environments of launchers, through the reader of grants and the resolver."""

from __future__ import annotations

import random

from tests.policy.values import CARDS, MIG, SUBJECT, CaseGenerator
from tfenv.launchers.grant import read_grant
from tfenv.launchers.parent import GRANT_VARIABLE, InheritedGrant, encode_grant
from tfenv.policy.device_set import keep_valid_tokens
from tfenv.policy.merge import merge
from tfenv.policy.model import EffectivePolicy, Grant, Inventory, MemoryLimit, Plan, Share
from tfenv.policy.resolve import NO_GPU, resolve
from tfenv.policy.visibility import needs_inventory

_BOOT = "b0"
#: Lists of GPUs as launchers and people write them, and what they should not.
_LISTS = ("0", "1", "3", "0,1", "2,3", "1,0,2", "0,1,2,3", "7", "", "-1", "a,b", CARDS[2].uuid, MIG[0], "0,0", "9" * 40)
_NUMBERS = ("0", "1", "2", "3", "", "-1", "x", "9" * 30, "1e9", "0.5", "2(x3),1", "2,,x(")
#: Each variable with the values that it may have.
_VARIABLES = {
    "SLURM_JOB_ID": ("14", "15", ""),
    "SLURM_STEP_ID": _NUMBERS,
    "SLURM_JOB_GPUS": _LISTS,
    "SLURM_STEP_GPUS": _LISTS,
    "SLURM_GPUS_ON_NODE": _NUMBERS,
    "SLURM_SHARDS_ON_NODE": _NUMBERS,
    "SLURM_TASKS_PER_NODE": _NUMBERS,
    "SLURM_STEP_TASKS_PER_NODE": _NUMBERS,
    "SLURM_NODEID": _NUMBERS,
    "SLURM_LOCALID": _NUMBERS,
    "SLURMD_TRES_BIND": ("gpu:per_task:1", "gpu:", "cpu", ""),
    "SLURM_ARRAY_JOB_ID": ("14", "x"),
    "RAY_JOB_ID": ("ffffffff", ""),
    "PBS_JOBID": ("7.host",),
    "LSB_JOBID": ("7",),
    "FLUX_JOB_ID": ("f7",),
    "FLUX_TASK_LOCAL_ID": _NUMBERS,
    "SGE_TASK_ID": ("undefined",),
    "JOB_ID": ("7",),
    "KUBERNETES_SERVICE_HOST": ("10.0.0.1",),
    "HOSTNAME": ("pod-7", ""),
    "NVIDIA_VISIBLE_DEVICES": (
        "all",
        "void",
        "none",
        "",
        CARDS[0].uuid,
        f"{CARDS[0].uuid},{CARDS[3].uuid}",
        "0,1",
        "x",
    ),
    "JUPYTERHUB_USER": ("bob",),
    "JPY_SESSION_NAME": ("/home/bob/a.ipynb", ""),
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": _NUMBERS,
    "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": ("0=2G", "x", "0=,1", "0=1G,0=2G"),
    "OMPI_COMM_WORLD_LOCAL_RANK": _NUMBERS,
    "LOCAL_RANK": _NUMBERS,
    "CUDA_DEVICE_ORDER": ("PCI_BUS_ID", "FASTEST_FIRST"),
}


def _draw_environment(draw: random.Random) -> dict[str, str]:
    environ = {name: draw.choice(values) for name, values in _VARIABLES.items() if draw.random() < 0.3}
    if draw.random() < 0.6:
        environ["CUDA_VISIBLE_DEVICES"] = draw.choice(_LISTS)
    if draw.random() < 0.3:
        given, request, wrote = (draw.choice((None, *_LISTS)) for _ in range(3))
        job, handed = draw.choice(("", "SLURM_JOB_ID=14")), draw.random() < 0.5
        share = draw.choice((None, Share("Ray", "num_gpus=0.5", 0.5)))
        parent = InheritedGrant(given, request, wrote, (), job, handed, share)
        environ[GRANT_VARIABLE] = encode_grant(parent, _BOOT)
    return environ


def test_no_environment_leads_outside_the_grant(exhaustive: bool) -> None:
    """Whatever launchers set, whatever a policy says: no exception, and no GPU that was not given."""
    for seed in range(10_000 if exhaustive else 1_000):
        draw = CaseGenerator(seed)
        environ, case = _draw_environment(draw), draw.draw_case()
        grant, inherited = read_grant(environ, environ, _BOOT)
        policy = merge(case.layers, SUBJECT)
        request = None if inherited.request is None else tuple(inherited.request.split(","))
        needs_inventory(policy, grant, request)
        made = resolve(policy, grant, case.inventory, request)
        _assert_within(made, grant, policy, case.inventory, f"seed {seed}: {environ}")


def _assert_within(made: Plan, grant: Grant, policy: EffectivePolicy, inventory: Inventory, case: str) -> None:
    visible = () if made.visible in (None, NO_GPU) else tuple(str(made.visible).split(","))
    given = keep_valid_tokens(grant.tokens or ())
    if made.visible is None and grant.listed is not None:
        assert set(given) <= set(grant.listed) or _count_anew(grant, inventory), case  # what CUDA reads by itself
    if grant.listed is not None:
        # A scheduler that hides the others' device files counts anew.
        assert len(visible) <= len(grant.listed), case
        named = {str(card.index) for card in inventory.devices or () if {card.uuid, card.parent} & set(grant.listed)}
        assert set(visible) <= {*grant.listed, *given, *named, *_count_anew(grant, inventory)}, case
    elif grant.tokens is not None:
        assert set(visible) <= set(given), case
    if grant.handed is not None and grant.tokens is not None:
        assert set(visible) <= {*given, *(grant.listed or ())}, case
    required = [ceiling.value for ceiling in policy.list_ceilings("require_grant") if ceiling.value]
    if required and grant.scheduler and not (grant.listed or grant.mounted or (grant.tokens and not grant.unlisted)):
        assert made.visible == NO_GPU, case
    if "always" in required and not grant.scheduler:
        assert made.visible == NO_GPU, case
    _assert_within_share(made, grant, policy, case)


def _assert_within_share(made: Plan, grant: Grant, policy: EffectivePolicy, case: str) -> None:
    fraction = None if grant.share is None else grant.share.measure(policy.shards_per_gpu)
    limits = [ceiling.value for ceiling in policy.list_ceilings("memory_limit")]
    if fraction is None or not any(isinstance(limit, MemoryLimit) and limit.granted for limit in limits):
        return
    assert 0 < fraction <= 1, case
    for device in made.devices or ():
        total = device.total or 24 << 30
        assert device.limit is not None, case
        assert (device.limit.on(total) or 0) <= total * fraction, case


def _count_anew(grant: Grant, inventory: Inventory) -> set[str]:
    shown = {device.index for device in inventory.devices or ()}
    absent = any(int(token) not in shown for token in grant.listed or () if token.isdigit())
    is_hidden = bool(shown) and (len(shown) == len(grant.listed or ()) or absent)
    return set(map(str, shown)) if is_hidden else set()
