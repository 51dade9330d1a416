"""Agents: a model acts by calling tools, within permissions and budgets."""

from llmjax.agents.tools import tool

__all__ = ["tool"]
