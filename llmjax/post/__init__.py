"""From a base model to an assistant: conversations, rewards, preferences, policies, each a run of the one loop."""
