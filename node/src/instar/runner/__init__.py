"""One process per job. What happens in it cannot harm the agent."""
