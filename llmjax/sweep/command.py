"""The verbs of this room: `sweep`, `laws`, `budget` and `coordcheck`."""

from llmjax.sweep import budget_command, coordcheck_command, laws_command, study_command

VERBS = {**study_command.VERBS, **laws_command.VERBS, **budget_command.VERBS, **coordcheck_command.VERBS}
