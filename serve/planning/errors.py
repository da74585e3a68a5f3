"""What makes a plan impossible to begin with."""


class PlanError(ValueError):
    """The question cannot be answered; the message says what to ask instead."""
