"""The verbs of this room: `sweep`, `laws` and `budget`."""

from llmjax.sweep import budget_command, laws_command, study_command

VERBS = {**study_command.VERBS, **laws_command.VERBS, **budget_command.VERBS}
