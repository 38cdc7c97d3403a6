"""What the policy means for one framework that has a process to itself."""

from __future__ import annotations

from tfenv.explanation import Explanation
from tfenv.frameworks.registry import get_framework
from tfenv.pipeline import current_start, load
from tfenv.policy.budget import BudgetBook, Claimant
from tfenv.policy.model import Plan
from tfenv.policy.supports import drop_unsupported
from tfenv.values import replace


def make_framework_plan(name: str, explanation: Explanation) -> Plan:
    """Return what a framework may use. A policy that is switched off leaves it everything.

    Args:
        name: Its package.
        explanation: The policy that holds here.
    """
    if explanation.disabled:
        return Plan()
    framework, policy = get_framework(name), load(current_start()).policy
    plan = drop_unsupported(explanation.plan, policy, framework.supports, framework.title)
    budget = BudgetBook().fit(plan, None, policy, Claimant(name, framework.title))
    return replace(plan, devices=()) if budget.spent else budget.plan
