"""The engine on a real tiny model: equal to one-at-a-time generation whatever the policies, budgets, chunks and mix."""
