"""Train a feature field on posed photographs with the objective of F3RM and nerfstudio."""


class InputError(Exception):
    """Something the user gave cannot be used; the message says what must change, in one line."""


class InputWarning(UserWarning):
    """Something the user gave is used only in part."""
