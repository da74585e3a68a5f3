"""The error of invalid inputs of a plan."""


class PlanError(ValueError):
    """Nothing can be planned from these inputs; the message says what to change."""
