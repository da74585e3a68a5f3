"""What makes a plan impossible to begin with."""


class PlanError(ValueError):
    """Nothing can be planned from these inputs; the message says what to change."""
