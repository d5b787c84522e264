class Runner:
    """Placeholder until the branch is merged."""
