"""One exception for a user's mistakes, so that a command can end in one line, not a traceback."""


class UserError(ValueError):
    """A setting, file or argument the user chose can't be used.

    The message is one line that names the setting, the rule and the value. Commands print it and
    exit with code 2; anything else that escapes is our bug and keeps its traceback.
    """


def require(condition: bool, setting: str, rule: str, got: object) -> None:
    """Raise ``UserError("<setting> <rule>, got <value>")`` unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{setting} {rule}, got {got!r}")
